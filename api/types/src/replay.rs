//! What one side of an exec WebSocket has sent and the other has not acknowledged.
//!
//! ```text
//!   acknowledged ─►│ kept: may have to be sent again │─► not said yet
//!              first()                            end()
//! ```
//! Both sides keep theirs: `arkd` what the program says, the client what goes to the program. Nothing is dropped: who has
//! [no room](Replay::has_room) waits until the other side acknowledges. Both acknowledge at least every [`ACK_EVERY`], so that
//! neither waits for ever.

use std::collections::VecDeque;

use bytes::Bytes;

/// What is kept at most before one more frame finds no room, counting [`cost`]: 1 MiB.
pub const WINDOW: usize = 1 << 20;
/// After how much that arrived it is acknowledged, counting [`cost`].
pub const ACK_EVERY: usize = WINDOW / 8;
/// What keeping a frame costs besides its bytes.
const OVERHEAD: usize = 64;

/// Memory that keeping a frame of `len` bytes counts as.
#[must_use]
pub const fn cost(len: usize) -> usize {
    len.saturating_add(OVERHEAD)
}

/// Frames by their numbers, from 0.
#[derive(Debug)]
pub struct Replay {
    kept: VecDeque<Bytes>,
    /// Number of the first one that is kept.
    first: u64,
    cost: usize,
    window: usize,
}

/// A number that no frame has yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{number} frames are acknowledged, and only {end} were sent")]
pub struct Unsent {
    /// The number.
    pub number: u64,
    /// Frames there were.
    pub end: u64,
}

impl Replay {
    /// Keeps up to `window` and one frame.
    #[must_use]
    pub const fn new(window: usize) -> Self {
        Self { kept: VecDeque::new(), first: 0, cost: 0, window }
    }

    /// Whether another frame may be pushed.
    #[must_use]
    pub const fn has_room(&self) -> bool {
        self.cost < self.window
    }

    /// Keeps `frame` as the next one.
    pub fn push(&mut self, frame: Bytes) {
        self.cost = self.cost.saturating_add(cost(frame.len()));
        self.kept.push_back(frame);
    }

    /// Number of the first frame that is kept; all before it are acknowledged.
    #[must_use]
    pub const fn first(&self) -> u64 {
        self.first
    }

    /// Number of the next frame that is pushed.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first.saturating_add(u64::try_from(self.kept.len()).unwrap_or(u64::MAX))
    }

    /// The frame of that number, while it is kept.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<&Bytes> {
        let at = usize::try_from(number.checked_sub(self.first)?).ok()?;
        self.kept.get(at)
    }

    /// Lets go of the frames before `number`.
    ///
    /// # Errors
    /// [`Unsent`]; nothing is let go of then.
    pub fn acknowledge(&mut self, number: u64) -> Result<(), Unsent> {
        let end = self.end();
        if number > end {
            return Err(Unsent { number, end });
        }
        while self.first < number
            && let Some(frame) = self.kept.pop_front()
        {
            self.cost = self.cost.saturating_sub(cost(frame.len()));
            self.first += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_not_acknowledged_is_kept_and_the_rest_is_not(
            steps in prop::collection::vec((0usize..300, 0u64..40), 0..60),
        ) {
            let (mut replay, mut all, mut acknowledged) = (Replay::new(2000), Vec::new(), 0);
            for (len, ack) in steps {
                if replay.has_room() {
                    let frame = Bytes::from(vec![u8::try_from(len % 251).unwrap(); len]);
                    all.push(frame.clone());
                    replay.push(frame);
                }
                let said = replay.acknowledge(ack);
                if ack <= all.len() as u64 {
                    acknowledged = acknowledged.max(ack);
                    prop_assert_eq!(said, Ok(()));
                } else {
                    prop_assert_eq!(said, Err(Unsent { number: ack, end: all.len() as u64 }));
                }
                prop_assert_eq!((replay.first(), replay.end()), (acknowledged, all.len() as u64));
                for number in 0..all.len() as u64 + 2 {
                    let expected = all.get(usize::try_from(number).unwrap()).filter(|_| number >= acknowledged);
                    prop_assert_eq!(replay.get(number), expected);
                }
                let kept: usize = all[usize::try_from(acknowledged).unwrap()..].iter().map(|f| cost(f.len())).sum();
                prop_assert_eq!(replay.has_room(), kept < 2000);
            }
        }
    }
}
