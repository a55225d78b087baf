//! A chain of snapshots as one full snapshot.

use std::path::Path;

use super::build::{Builder, Keep, chunk_buffer};
use super::chain::{Chain, Links};
use super::draft::{About, Draft};
use super::verify::read_chunk;
use super::{CHUNK_PAGES, PAGE, SnapshotError, Written, runs};

/// Writes the snapshot in `dir` and its bases as one full snapshot of a new identity at `out`, which must not exist; all
/// else of its manifest, the time included, stays, and so does its state. Every page is checked as it is read.
///
/// # Errors
/// Those of [`super::verify`] and of [`Draft::write`].
pub fn compact(dir: &Path, out: &Path) -> Result<Written, SnapshotError> {
    let chain = Chain::open(dir)?;
    let manifest = chain.manifest();
    let about = About {
        vcpus: manifest.vcpus,
        processor: manifest.processor.clone(),
        disks: manifest.disks.clone(),
        guest_cid: manifest.guest_cid,
        labels: manifest.labels.clone(),
    };
    let draft = Draft::begin(out, about, None)?.taken_at(manifest.created_unix_ms);
    let bytes = manifest.memory_mib << 20;
    draft.write_full(bytes, chain.state(), |builder| merge(chain.links(), bytes / PAGE, builder))
}

/// Lays the pages of each link over those below it, chunk by chunk.
fn merge(links: &Links, pages: u64, builder: &mut Builder) -> Result<(), SnapshotError> {
    let (mut merged, mut buffer) = (chunk_buffer(), chunk_buffer());
    let mut layers: Vec<_> = links.iter().rev().map(|link| (link, link.sums.chunks().peekable())).collect();
    for chunk in 0..pages.div_ceil(CHUNK_PAGES) {
        let mut named = 0;
        for (link, chunks) in &mut layers {
            let Some((_, mask, sum)) = chunks.next_if(|(next, ..)| *next == chunk) else { continue };
            read_chunk(link, chunk, mask, sum, &mut buffer)?;
            for (first, count) in runs::stretches(mask) {
                let from = super::sums::stretch(&buffer, first, count);
                super::sums::stretch_mut(&mut merged, first, count).copy_from_slice(from);
            }
            named |= mask;
        }
        builder.chunk(chunk, named, &merged, Keep::NonZero)?;
    }
    Ok(())
}
