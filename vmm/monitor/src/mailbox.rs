//! How other threads tell the owner of the VM's state what happened.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What threads other than the owner have to say. A guest cannot flood the mailbox: the power registers and the panic
/// port report once, and a vCPU that cannot go on does not run again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// The guest powered itself off.
    GuestPowerOff,
    /// The guest reset itself.
    GuestReset,
    /// The guest's kernel says that it panicked; it still runs, to print and to reset itself.
    GuestPanic,
    /// A guest processor cannot go on; how, as a sentence.
    GuestCrash(String),
    /// A part of the VMM cannot go on; why, as a sentence.
    Failed(String),
    /// The guest can never be asked to power off; why, as a sentence.
    CannotAsk(String),
}

/// The owner's queue; clones are further senders.
#[derive(Clone, Debug)]
pub struct Mailbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<VecDeque<News>>,
    bell: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { shared: Arc::new(Shared { queue: Mutex::default(), bell }) })
    }

    /// Leaves `news` for the owner.
    pub fn send(&self, news: News) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(news);
        // Fails only when the counter is full: then the bell rings already.
        let _ = self.shared.bell.write(1);
    }

    /// Takes the oldest news and, when there is none, silences the bell.
    #[must_use]
    pub fn take(&self) -> Option<News> {
        let mut queue = self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.is_empty() {
            let _ = self.shared.bell.read();
        }
        queue.pop_front()
    }
}

impl AsRawFd for Mailbox {
    /// Readable while there is news.
    fn as_raw_fd(&self) -> RawFd {
        self.shared.bell.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_come_out_in_order() {
        let mailbox = Mailbox::new().unwrap();
        assert_eq!(mailbox.take(), None);
        mailbox.clone().send(News::GuestPanic);
        mailbox.send(News::GuestReset);
        assert_eq!(mailbox.take(), Some(News::GuestPanic));
        assert_eq!(mailbox.take(), Some(News::GuestReset));
        assert_eq!(mailbox.take(), None);
    }
}
