//! Which slot a session gets, and what it need not compute: pure decisions over what the slots hold.

use llama_cpp_2::token::LlamaToken;

/// A shared beginning shorter than this is computed rather than copied.
pub(super) const LEAST_SHARED: usize = 16;

/// What one slot holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct View<'a> {
    /// Whether a session is in it.
    pub(super) busy: bool,
    /// Tokens whose keys and values it has.
    pub(super) cached: &'a [LlamaToken],
    /// Tokens it will have when the prompt of its session is read; of an idle slot, `cached`.
    pub(super) coming: &'a [LlamaToken],
    /// When it was last used; larger is later.
    pub(super) used: u64,
}

/// Where a session goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    /// The slot, which is idle.
    pub(super) slot: usize,
    /// Tokens of the prompt it has or gets.
    pub(super) keep: usize,
    /// The slot whose keys and values are to be copied, as soon as it has `keep` of them.
    pub(super) from: Option<usize>,
}

/// How many tokens two texts begin with alike.
pub(super) fn common(a: &[LlamaToken], b: &[LlamaToken]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

/// The place for a prompt of which at most `usable` tokens may come from the cache; `None` when no slot is idle.
pub(super) fn place(slots: &[View<'_>], prompt: &[LlamaToken], usable: usize) -> Option<Placement> {
    let shared = |tokens: &[LlamaToken]| common(tokens, prompt).min(usable);
    let idle = || slots.iter().enumerate().filter(|(_, s)| !s.busy);
    let (own, own_shared) = idle().map(|(i, s)| (i, shared(s.cached))).max_by_key(|(_, n)| *n)?;
    let (source, best) =
        slots.iter().enumerate().map(|(i, s)| (i, shared(s.coming))).max_by_key(|(_, n)| *n)?;
    // In its own place, when that is as good and does not cut off much of what others may come back to.
    let cut = slots.get(own).map_or(0, |s| s.cached.len()).saturating_sub(own_shared);
    if own_shared + LEAST_SHARED > best && cut <= own_shared {
        return Some(Placement { slot: own, keep: own_shared, from: None });
    }
    // The slot that was used longest ago makes room; the source itself only if it is the only one.
    let (slot, view) = idle().min_by_key(|(i, s)| (*i == source, s.used))?;
    if slot == source || best < LEAST_SHARED {
        return Some(Placement { slot, keep: shared(view.cached), from: None });
    }
    Some(Placement { slot, keep: best, from: Some(source) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(range: std::ops::Range<i32>) -> Vec<LlamaToken> {
        range.map(LlamaToken::new).collect()
    }

    fn idle(cached: &[LlamaToken], used: u64) -> View<'_> {
        View { busy: false, cached, coming: cached, used }
    }

    fn placed(slots: &[View<'_>], prompt: &[LlamaToken]) -> Option<(usize, usize, Option<usize>)> {
        place(slots, prompt, prompt.len() - 1).map(|p| (p.slot, p.keep, p.from))
    }

    #[test]
    fn nothing_is_idle_nothing_is_placed() {
        let t = tokens(0..9);
        assert_eq!(placed(&[View { busy: true, ..idle(&t, 0) }], &t), None);
    }

    #[test]
    fn a_conversation_goes_on_in_its_own_slot() {
        let (first, second) = (tokens(0..100), tokens(500..600));
        assert_eq!(placed(&[idle(&second, 1), idle(&first, 2)], &tokens(0..150)), Some((1, 100, None)));
    }

    #[test]
    fn the_same_prompt_again_computes_its_last_token_only() {
        let t = tokens(0..100);
        assert_eq!(placed(&[idle(&t, 1)], &t), Some((0, 99, None)));
    }

    #[test]
    fn a_short_part_of_a_long_text_is_copied_to_the_oldest_slot() {
        let (long, other) = (tokens(0..300), tokens(1000..1010));
        let mut prompt = tokens(0..100);
        prompt.extend(tokens(2000..2050));
        assert_eq!(
            placed(&[idle(&long, 5), idle(&other, 1), idle(&[], 3)], &prompt),
            Some((1, 100, Some(0)))
        );
    }

    #[test]
    fn what_a_busy_slot_has_or_will_have_is_copied() {
        let (prompt, have) = (tokens(0..100), tokens(0..20));
        let reading = View { busy: true, cached: &have, coming: &prompt, used: 9 };
        assert_eq!(placed(&[reading, idle(&[], 0)], &tokens(0..200)), Some((1, 100, Some(0))));
    }

    #[test]
    fn the_only_slot_is_used_in_place() {
        let long = tokens(0..300);
        let mut prompt = tokens(0..100);
        prompt.extend(tokens(2000..2050));
        assert_eq!(placed(&[idle(&long, 5)], &prompt), Some((0, 100, None)));
    }

    #[test]
    fn a_few_tokens_alike_are_not_worth_a_copy() {
        let t = tokens(0..8);
        let busy = View { busy: true, ..idle(&t, 3) };
        assert_eq!(placed(&[busy, idle(&[], 2)], &tokens(0..50)), Some((1, 0, None)));
    }
}
