//! The device against real Unix sockets and a small driver that plays the guest.

mod credit;
mod guest;
mod hostile;
mod load;
mod packets;
mod restore;
mod streams;
