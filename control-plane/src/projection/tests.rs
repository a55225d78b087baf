//! The projection against the events it is made of.
