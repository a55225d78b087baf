//! Getting a vCPU's thread out of `KVM_RUN` from another thread.
//!
//! `immediate_exit` in the page that KVM shares makes the next `KVM_RUN` return at once, a signal ends the current one. The
//! flag is stored before the signal is sent, so a signal that comes a moment too early does no harm. Each side writes its
//! own word and then reads the other's, both sequentially consistent: either the kicker sees the thread, or the thread
//! sees the flag.

use std::io;
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU8, AtomicU32, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::{KvmRunWrapper, VcpuFd};

use crate::Kick;

/// No thread runs the vCPU.
const NOBODY: i32 = 0;

/// The signal that ends `KVM_RUN`: the first real-time signal that the C library leaves to programs.
fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler for the kick signal, once per process. It does nothing: that `KVM_RUN` was interrupted is all.
/// SA_RESTART spares other system calls of a thread that a late kick reaches; `KVM_RUN` returns in any case.
pub(super) fn install_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static RESULT: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || {
        // SAFETY: sigaction is plain data for which all zeroes is a valid value (no flags, empty mask).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the handler does nothing and so is async-signal-safe; the old action is not asked for.
        let result = unsafe { libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL))
        }
    };
    RESULT.get_or_init(install).map_err(io::Error::from_raw_os_error)
}

/// A second mapping of the page that KVM shares with the VMM, owned by whoever may kick; the vCPU's own mapping may go
/// before it.
pub(super) struct RunPage {
    page: NonNull<kvm_run>,
    thread: AtomicI32,
    /// Keeps the page mapped.
    _mapping: KvmRunWrapper,
}

// SAFETY: the page is only accessed by atomics and by volatile reads of what the kernel wrote.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    pub(super) fn map(vcpu: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        let mut mapping = KvmRunWrapper::mmap_from_fd(vcpu, size_of::<kvm_run>())?;
        let page = NonNull::from(mapping.as_mut_ref());
        Ok(Self { page, thread: AtomicI32::new(NOBODY), _mapping: mapping })
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the field lies in the page that `_mapping` keeps mapped.
        let field = unsafe { &raw mut (*self.page.as_ptr()).immediate_exit };
        // SAFETY: a byte is always aligned, lives as long as `self`, and this process accesses it only atomically.
        unsafe { AtomicU8::from_ptr(field) }
    }

    pub(super) fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit().store(on.into(), Ordering::SeqCst);
    }

    /// Says that the calling thread is about to run the vCPU.
    pub(super) fn enter(&self) {
        thread_local!(static TID: libc::pid_t = {
            // SAFETY: gettid has no arguments and cannot fail.
            unsafe { libc::gettid() }
        });
        self.thread.store(TID.with(|tid| *tid), Ordering::SeqCst);
    }

    /// Says that nobody will run the vCPU any more.
    pub(super) fn leave(&self) {
        self.thread.store(NOBODY, Ordering::SeqCst);
    }

    /// `KVM_EXIT_*` of the last exit.
    pub(super) fn exit_reason(&self) -> u32 {
        // SAFETY: the field lies in the page that `_mapping` keeps mapped.
        let field = unsafe { &raw mut (*self.page.as_ptr()).exit_reason };
        // SAFETY: aligned, mapped as long as `self`; the kernel writes it only during KVM_RUN.
        unsafe { AtomicU32::from_ptr(field) }.load(Ordering::Relaxed)
    }

    /// `KVM_INTERNAL_ERROR_*` of the last exit, which must have been `KVM_EXIT_INTERNAL_ERROR`.
    pub(super) fn internal_error(&self) -> u32 {
        // SAFETY: the field lies in the page that `_mapping` keeps mapped.
        let field = unsafe { &raw mut (*self.page.as_ptr()).__bindgen_anon_1.internal.suberror };
        // SAFETY: aligned, mapped as long as `self`; the kernel writes it only during KVM_RUN.
        unsafe { AtomicU32::from_ptr(field) }.load(Ordering::Relaxed)
    }
}

impl Kick for RunPage {
    fn kick(&self) {
        self.set_immediate_exit(true);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != NOBODY {
            let process = std::process::id();
            // SAFETY: tgkill takes integers. Should the thread have ended and its number be another thread's of this
            // process by now, that one's handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
        }
    }
}
