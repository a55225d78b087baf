//! The database: its tables, how it is opened, and which files are refused.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::OpenError;

/// Marks the file as ours (`ARKL`), where SQLite keeps such marks.
pub(super) const APPLICATION_ID: i64 = 0x41_52_4B_4C;
/// How long a reader waits while the database is being recovered.
const BUSY: Duration = Duration::from_secs(5);
/// Most bytes of the write-ahead log that stay allocated.
const WAL_LIMIT: i64 = 16 << 20;

/// What takes a database from one form to the next; its form is how many of these it went through.
pub(super) const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE event (
        -- Grows by one and is never used twice.
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        at_unix_ms INTEGER NOT NULL,
        stream TEXT NOT NULL,
        version INTEGER NOT NULL,
        event TEXT NOT NULL
    );
    CREATE TABLE stream (
        stream TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        -- Of its newest event.
        position INTEGER NOT NULL,
        ended INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX ended_stream ON stream (position) WHERE ended;
    CREATE TABLE snapshot (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        position INTEGER NOT NULL,
        data BLOB NOT NULL
    );
    CREATE TABLE log (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        -- Events up to here are gone.
        floor INTEGER NOT NULL,
        -- Grows to see whether the log can be written.
        tries INTEGER NOT NULL
    );
    INSERT INTO log VALUES (1, 0, 0);
",
    "
    -- Behind the data: who reads that does not touch the pages of this.
    ALTER TABLE snapshot ADD COLUMN past BLOB NOT NULL DEFAULT x'';
",
];

/// The writer's connection to the database at `path`, which is made when it is not there and brought to the newest form.
pub(super) fn open(path: &Path) -> Result<Connection, OpenError> {
    let file = |source| OpenError::File { path: path.to_owned(), source };
    // What agents there are is nobody else's business, from the beginning.
    OpenOptions::new().create(true).append(true).mode(0o600).open(path).map_err(file)?;
    open_database(path).map_err(|error| match error {
        Failure::Open(error) => error,
        Failure::Sqlite(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => {
            OpenError::Foreign { path: path.to_owned() }
        }
        Failure::Sqlite(error) => OpenError::Damaged { path: path.to_owned(), why: error.to_string() },
    })
}

/// A reader's connection.
pub(super) fn open_reader(path: &Path) -> rusqlite::Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let database = Connection::open_with_flags(path, flags)?;
    database.busy_timeout(BUSY)?;
    Ok(database)
}

enum Failure {
    Open(OpenError),
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for Failure {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

fn open_database(path: &Path) -> Result<Connection, Failure> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut database = Connection::open_with_flags(path, flags)?;
    database.busy_timeout(BUSY)?;
    let number = |name: &str| database.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    let (mark, form) = (number("application_id")?, number("user_version")?);
    let tables: i64 = database.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    let is_new = (mark, form, tables) == (0, 0, 0);
    let known = i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX);
    if !is_new && mark != APPLICATION_ID {
        return Err(Failure::Open(OpenError::Foreign { path: path.to_owned() }));
    }
    if form > known {
        return Err(Failure::Open(OpenError::Newer { path: path.to_owned(), found: form, known }));
    }
    let mode: String =
        database.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0))?;
    if mode != "wal" {
        let why = format!("its journal is of mode {mode} and cannot be a write-ahead log there");
        return Err(Failure::Open(OpenError::Damaged { path: path.to_owned(), why }));
    }
    // A commit is durable when it returns.
    database.pragma_update(None, "synchronous", "FULL")?;
    database.pragma_update(None, "journal_size_limit", WAL_LIMIT)?;
    migrate(&mut database, form)?;
    Ok(database)
}

fn migrate(database: &mut Connection, form: i64) -> rusqlite::Result<()> {
    for (done, step) in (0..).zip(MIGRATIONS).skip_while(|(done, _)| *done < form) {
        let transaction = database.transaction()?;
        transaction.execute_batch(step)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
        transaction.pragma_update(None, "user_version", done + 1)?;
        transaction.commit()?;
    }
    Ok(())
}
