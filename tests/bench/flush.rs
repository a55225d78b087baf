//! The log of events on a disk whose flush takes longer than this one's: `arkd` in this process, as it is, over an SQLite whose way to
//! the disk (its VFS) pauses before every flush and then carries it out.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ark_tests::{World, assets};
use ark_types::layout::StateDir;
use arkd::args::Args;
use arkd::config::Config;
use arkd::daemon::Daemon;
use arkd::settings::Settings;
use clap::Parser as _;
use rusqlite::ffi;
use tokio::runtime::Runtime;

/// Opens a file: `xOpen` of a VFS.
type Open = unsafe extern "C" fn(
    *mut ffi::sqlite3_vfs,
    ffi::sqlite3_filename,
    *mut ffi::sqlite3_file,
    c_int,
    *mut c_int,
) -> c_int;
/// Flushes one: `xSync` of its methods.
type Flush = unsafe extern "C" fn(*mut ffi::sqlite3_file, c_int) -> c_int;

/// Microseconds before every flush.
static PAUSE: AtomicU64 = AtomicU64::new(0);
/// The system's own ways.
static OPEN: OnceLock<Open> = OnceLock::new();
static SYNC: OnceLock<Flush> = OnceLock::new();
/// The methods of files that pause, by the address of those that do not.
static PAUSING: Mutex<BTreeMap<usize, &'static ffi::sqlite3_io_methods>> = Mutex::new(BTreeMap::new());

/// An `arkd` in this process that serves `world`.
pub(crate) struct Serving {
    runtime: Runtime,
    daemon: Daemon,
}

impl Serving {
    /// Serves `world` with `pause` before every flush of its log.
    pub(crate) fn start(world: &World, pause: Duration) -> Self {
        static INSTALLED: OnceLock<()> = OnceLock::new();
        INSTALLED.get_or_init(install);
        PAUSE.store(u64::try_from(pause.as_micros()).expect("short"), Ordering::Relaxed);
        let settings = Settings::default();
        let config = Config::new(&Args::parse_from(["arkd"]), &settings).expect("a configuration");
        let state = StateDir(world.path().join("state"));
        let (assets, run, token_file) = (assets(), world.run_dir(), state.token());
        let config = Config { assets, run, state, token_file, ..config };
        // As many workers as arkd's own.
        let workers = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = workers.expect("a runtime");
        let daemon = runtime.block_on(Daemon::start(config)).expect("arkd starts");
        Self { runtime, daemon }
    }

    /// Ends it.
    pub(crate) fn end(self) {
        self.runtime.block_on(self.daemon.shut_down());
    }
}

/// Makes files that pause what SQLite opens from here on.
fn install() {
    // SAFETY: a null name asks for the default VFS, which lives as long as the process.
    let real = unsafe { ffi::sqlite3_vfs_find(std::ptr::null()) };
    // SAFETY: SQLite has a default VFS on every Unix, and does not change it.
    let real = unsafe { *real };
    OPEN.get_or_init(|| real.xOpen.expect("a VFS opens files"));
    // All else, the data that it has of its own too, is the real one's.
    let ours = ffi::sqlite3_vfs {
        zName: c"pausing".as_ptr(),
        xOpen: Some(open),
        pNext: std::ptr::null_mut(),
        ..real
    };
    // SAFETY: it is leaked, so it lives as long as the process, as SQLite wants it.
    let registered = unsafe { ffi::sqlite3_vfs_register(Box::leak(Box::new(ours)), 1) };
    assert_eq!(registered, ffi::SQLITE_OK, "the VFS is taken");
}

/// As the real one opens a file, but that it pauses before its flushes.
unsafe extern "C" fn open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    told: *mut c_int,
) -> c_int {
    let Some(real) = OPEN.get() else { return ffi::SQLITE_CANTOPEN };
    // SAFETY: these are SQLite's own arguments, and ours is the real VFS under another name.
    let answer = unsafe { real(vfs, name, file, flags, told) };
    // SAFETY: SQLite gives a file that nobody else has yet.
    let file = unsafe { &mut *file };
    if answer == ffi::SQLITE_OK && !file.pMethods.is_null() {
        file.pMethods = pausing(file.pMethods);
    }
    answer
}

fn pausing(real: *const ffi::sqlite3_io_methods) -> &'static ffi::sqlite3_io_methods {
    let mut known = PAUSING.lock().unwrap_or_else(PoisonError::into_inner);
    known.entry(real.addr()).or_insert_with(|| {
        // SAFETY: methods of files are constants of SQLite's.
        let real = unsafe { *real };
        // The same for every kind of file, which differ in how they are locked.
        SYNC.get_or_init(|| real.xSync.expect("a file can be flushed"));
        Box::leak(Box::new(ffi::sqlite3_io_methods { xSync: Some(sync), ..real }))
    })
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, flags: c_int) -> c_int {
    let Some(real) = SYNC.get() else { return ffi::SQLITE_IOERR_FSYNC };
    std::thread::sleep(Duration::from_micros(PAUSE.load(Ordering::Relaxed)));
    // SAFETY: these are SQLite's own arguments.
    unsafe { real(file, flags) }
}
