//! ETags: who changes a thing can make sure that it still is what he saw.
//!
//! `GET` of one thing, anything whose route ends in a parameter, carries an `ETag`; with `If-None-Match` it is 304 while nothing
//! changed. Whatever else is asked of the thing, or of what is below it (`DELETE`, `PUT`, `PATCH`, `POST …/pause`), is refused
//! with 412 when it comes with an `If-Match` that no longer holds. This is a layer around every route, so it holds for those
//! that are added, too.
//!
//! A tag is a digest of the representation without what is [`MEASURED`] in it. It is no version of a stream of events, because
//! snapshots and templates have none and an agent's state has parts that no event tells of; and measurements are left out, because
//! a heartbeat twice a second would make every condition fail. So two things with one tag are equal in all that anybody asked for
//! or can ask to be changed, which is what `If-Match` is about; the tags are strong in this sense.
//!
//! A condition and what it guards are one step: requests with a condition, and all that replace or patch the thing, take
//! their turns, one thing at a time. What happens to an agent by itself, such as its end, may still come in between.

mod layer;
mod tag;
mod turns;

pub use layer::{Tagged, conditional};
pub use tag::{Condition, ETag, MEASURED};
pub use turns::Turns;
