//! Lists that come in pages, oldest first, each with a cursor of where the next one begins.

use std::str::FromStr;

use ark_types::label::InvalidSelector;
use ark_types::problem::ProblemKind;

use crate::problems::Refusal;
use crate::projection::Place;

/// Which page of a list is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Paging {
    /// Most of a page.
    limit: usize,
    /// Where the page before ended.
    pub(super) after: Option<Place>,
}

fn invalid(detail: String) -> Refusal {
    Refusal::new(ProblemKind::InvalidValue, detail)
}

/// How many of `what` are asked for, of which a page has `most` at most.
///
/// # Errors
/// A number out of bounds.
pub(super) fn bounded(limit: usize, most: usize, what: &str) -> Result<usize, Refusal> {
    if (1..=most).contains(&limit) {
        return Ok(limit);
    }
    Err(invalid(format!("{limit} {what} are no page: ask for 1 to {most}")))
}

/// What `text` selects; everything when absent.
///
/// # Errors
/// A text that is no selector.
pub(super) fn selector<T: FromStr<Err = InvalidSelector>>(text: Option<String>) -> Result<T, Refusal> {
    text.unwrap_or_default().parse().map_err(|error: InvalidSelector| invalid(error.to_string()))
}

impl Paging {
    /// The page behind `cursor` of at most `limit` of `what`, of which a page has `most` at most and when that is absent.
    ///
    /// # Errors
    /// A number out of bounds, or a text that is no cursor.
    pub(super) fn new(
        limit: Option<usize>,
        cursor: Option<&str>,
        most: usize,
        what: &str,
    ) -> Result<Self, Refusal> {
        let limit = bounded(limit.unwrap_or(most), most, what)?;
        Ok(Self { limit, after: cursor.map(from_cursor).transpose()? })
    }

    /// How many have to be looked at: one more than a page has, to know whether it is the last.
    pub(super) const fn reach(&self) -> usize {
        self.limit.saturating_add(1)
    }

    /// The page that `found` begins with, those behind [`Self::after`] in their order, and the cursor of the next one.
    pub(super) fn page<T>(&self, mut found: Vec<T>, place: impl Fn(&T) -> Place) -> (Vec<T>, Option<String>) {
        let more = found.len() > self.limit;
        found.truncate(self.limit);
        let next = found.last().filter(|_| more).map(|last| to_cursor(&place(last)));
        (found, next)
    }
}

/// Where a page ended, in a form that only [`from_cursor`] has to understand.
fn to_cursor((created_unix_ms, id): &Place) -> String {
    format!("{created_unix_ms}-{id}")
}

/// The place that [`to_cursor`] made a cursor of.
fn from_cursor(cursor: &str) -> Result<Place, Refusal> {
    let place = cursor.split_once('-').and_then(|(at, id)| Some((at.parse().ok()?, id.to_owned())));
    place.ok_or_else(|| {
        invalid(format!("{cursor:?} is no cursor: send `next_cursor` of the page before as it is"))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn page_after_page_gives_everything_once(
            places in prop::collection::btree_set((0..50_u64, "[0-9a-f]{4}"), 0..40), limit in 1..10_usize,
        ) {
            let (mut seen, mut cursor) = (Vec::new(), None::<String>);
            loop {
                let paging = Paging::new(Some(limit), cursor.as_deref(), 10, "things").unwrap();
                let found: Vec<Place> = places
                    .iter()
                    .filter(|place| paging.after.as_ref().is_none_or(|after| *place > after))
                    .take(paging.reach())
                    .cloned()
                    .collect();
                let (page, next) = paging.page(found, Clone::clone);
                prop_assert!(page.len() == limit || next.is_none());
                seen.extend(page);
                match next {
                    Some(next) => cursor = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(seen, places.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn pages_are_bounded_and_cursors_ours() {
        for (limit, cursor) in [(Some(0), None), (Some(11), None), (None, Some("")), (None, Some("x-1"))] {
            let refused = Paging::new(limit, cursor, 10, "things").unwrap_err().0;
            assert_eq!(refused.kind, ProblemKind::InvalidValue);
        }
        assert_eq!(Paging::new(None, None, 10, "things").unwrap().reach(), 11);
    }
}
