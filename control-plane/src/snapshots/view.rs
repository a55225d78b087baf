//! Snapshots as clients see them.

use ark_types::agent::Agent;
use ark_types::checkpoint::Checkpoint;
use ark_types::snapshot::{Snapshot, SnapshotKind};
use ark_types::vmm::SnapshotId;

use super::store::Store;
use super::table::{Damaged, Entry, Place, Table};
use super::{Record, SnapshotError};

impl Store {
    /// Named snapshots, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Snapshot> {
        let table = self.lock();
        let mut all: Vec<Snapshot> =
            table.entries.iter().filter_map(|(id, entry)| view(&table, *id, entry)).collect();
        all.extend(table.damaged.values().map(view_damaged));
        all.sort_by(|a, b| (a.created_unix_ms, &a.name).cmp(&(b.created_unix_ms, &b.name)));
        all
    }

    /// How many snapshots there are and how many bytes they hold, by whose they are.
    #[must_use]
    pub fn usage(&self) -> [(&'static str, usize, u64); 4] {
        let table = self.lock();
        let places = [
            ("snapshot", Place::Snapshots),
            ("template", Place::Templates),
            ("paused", Place::Paused),
            ("checkpoint", Place::Checkpoints),
        ];
        places.map(|(kind, place)| {
            let of = || table.entries.values().filter(|entry| entry.place == place);
            (kind, of().count(), of().map(|entry| entry.manifest.written_bytes).sum())
        })
    }

    /// The checkpoint `checkpoint` of `agent`; none when it is no more.
    #[must_use]
    pub fn describe_checkpoint(&self, agent: &Agent, checkpoint: &Checkpoint) -> Option<Snapshot> {
        let table = self.lock();
        let entry = table.entries.get(&checkpoint.snapshot)?;
        let id = checkpoint.snapshot.to_string();
        let record = Record {
            // The digits of an id are those of a name.
            name: id.parse().ok()?,
            agent_id: agent.id.clone(),
            agent: agent.name.clone(),
            image: agent.image.clone(),
            image_digest: agent.image_digest.clone(),
            pause_us: checkpoint.pause_us,
            durable_us: checkpoint.durable_us,
            request: None,
        };
        Some(Snapshot { is_checkpoint: true, ..shown(&table, checkpoint.snapshot, entry, &record) })
    }

    /// The snapshot called `name`.
    ///
    /// # Errors
    /// [`SnapshotError::NotFound`].
    pub fn describe(&self, name: &str) -> Result<Snapshot, SnapshotError> {
        let table = self.lock();
        let found = table.by_name(name).and_then(|(id, entry)| view(&table, *id, entry));
        let found = found.or_else(|| table.damaged.get(name).map(view_damaged));
        found.ok_or_else(|| SnapshotError::NotFound(name.to_owned()))
    }
}

/// A named one; none for others.
fn view(table: &Table, id: SnapshotId, entry: &Entry) -> Option<Snapshot> {
    Some(shown(table, id, entry, entry.record.as_ref()?))
}

fn shown(table: &Table, id: SnapshotId, entry: &Entry, record: &Record) -> Snapshot {
    let manifest = &entry.manifest;
    Snapshot {
        name: record.name.clone(),
        id: id.to_string(),
        kind: if manifest.base.is_some() { SnapshotKind::Diff } else { SnapshotKind::Full },
        base: entry.base().map(|base| called(table, base)),
        agent: record.agent.clone(),
        image: record.image.clone(),
        vcpus: manifest.vcpus,
        memory_mib: manifest.memory_mib,
        bytes: manifest.written_bytes,
        pause_us: record.pause_us,
        durable_us: record.durable_us,
        created_unix_ms: manifest.created_unix_ms,
        children: table.children_count(id),
        agents: entry.tenants,
        is_checkpoint: false,
    }
}

/// One that cannot be used: what its record says, and no memory.
fn view_damaged(damaged: &Damaged) -> Snapshot {
    let Record { name, agent, image, pause_us, durable_us, .. } = damaged.record.clone();
    let id = damaged.dir.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Snapshot {
        name,
        id,
        kind: SnapshotKind::Full,
        base: None,
        agent,
        image,
        vcpus: 0,
        memory_mib: 0,
        bytes: 0,
        pause_us,
        durable_us,
        created_unix_ms: 0,
        children: 0,
        agents: 0,
        is_checkpoint: false,
    }
}

/// What a base is called.
fn called(table: &Table, id: SnapshotId) -> String {
    let entry = table.entries.get(&id);
    let name = entry.and_then(Entry::name).map(|name| format!("snapshot {name}"));
    name.or_else(|| entry.and_then(|entry| entry.title.clone())).unwrap_or_else(|| id.to_string())
}
