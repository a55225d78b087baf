//! Sets of pages as ascending runs, none empty, no two touching.

use ark_hal::memory::Run;

fn end(run: &Run) -> u64 {
    run.first + run.count
}

/// Appends pages that come after all others, joined to the last run where they touch it.
pub(super) fn push(runs: &mut Vec<Run>, first: u64, count: u64) {
    match runs.last_mut() {
        Some(last) if end(last) == first => last.count += count,
        _ => runs.push(Run { first, count }),
    }
}

/// Joins runs that have no more than `gap` pages between them; these belong to the set then, too.
pub(super) fn bridge(runs: &[Run], gap: u64) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last) if run.first - end(last) <= gap => last.count = end(run) - last.first,
            _ => joined.push(*run),
        }
    }
    joined
}

/// Pages of `a` or `b`.
pub(super) fn union(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut all: Vec<Run> = a.iter().chain(b).copied().collect();
    all.sort_unstable_by_key(|run| run.first);
    let mut joined: Vec<Run> = Vec::with_capacity(all.len());
    for run in all {
        match joined.last_mut() {
            Some(last) if end(last) >= run.first => last.count = end(last).max(end(&run)) - last.first,
            _ => joined.push(run),
        }
    }
    joined
}

/// Pages of `a` that are not of `b`.
pub(super) fn subtract(a: &[Run], b: &[Run]) -> Vec<Run> {
    let mut left = Vec::with_capacity(a.len());
    let mut others = b.iter().peekable();
    for run in a {
        let mut first = run.first;
        while others.next_if(|other| end(other) <= first).is_some() {}
        let mut overlapping = others.clone();
        while let Some(other) = overlapping.next_if(|other| other.first < end(run)) {
            if other.first > first {
                left.push(Run { first, count: other.first - first });
            }
            first = first.max(end(other));
        }
        if first < end(run) {
            left.push(Run { first, count: end(run) - first });
        }
    }
    left
}

/// Which pages of each layer are not covered by one above it. Layers and answers are topmost first.
pub(super) fn visible<'a>(layers: impl IntoIterator<Item = &'a [Run]>) -> Vec<Vec<Run>> {
    let mut covered = Vec::new();
    let seen = |runs: &[Run]| {
        let seen = subtract(runs, &covered);
        covered = union(&covered, runs);
        seen
    };
    layers.into_iter().map(seen).collect()
}

/// Splits runs into the parts that lie in each chunk of 64 pages: the chunk's number and a bit for each of its pages.
pub(super) fn masks(runs: &[Run]) -> impl Iterator<Item = (u64, u64)> {
    let mut rest = runs.iter().copied();
    let mut next = rest.next();
    std::iter::from_fn(move || {
        let chunk = next?.first / super::CHUNK_PAGES;
        let chunk_end = (chunk + 1) * super::CHUNK_PAGES;
        let mut mask = 0;
        while let Some(run) = next.filter(|run| run.first < chunk_end) {
            let count = run.count.min(chunk_end - run.first);
            mask |= bits(run.first % super::CHUNK_PAGES, count);
            next = if count < run.count {
                Some(Run { first: run.first + count, count: run.count - count })
            } else {
                rest.next()
            };
        }
        Some((chunk, mask))
    })
}

/// `count` (1 to 64) bits from bit `from` on.
fn bits(from: u64, count: u64) -> u64 {
    (u64::MAX >> (super::CHUNK_PAGES - count)) << from
}

/// The stretches of ones in a chunk's mask: first page in the chunk, and how many.
pub(super) fn stretches(mask: u64) -> impl Iterator<Item = (u32, u32)> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let first = rest.trailing_zeros();
        let count = (rest >> first).trailing_ones();
        rest &= !bits(u64::from(first), u64::from(count));
        Some((first, count))
    })
}

/// How many pages.
pub(super) fn pages(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}
