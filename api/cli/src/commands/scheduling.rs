//! `ark queue`, `ark hosts` and `ark quota`.

use ark_types::scheduling::{
    Host, HostList, OwnerList, OwnerQuota, Quota, RequestQueue, Resources, WaitingRequest,
};

use crate::args::QuotaArgs;
use crate::failure::Failure;
use crate::host::Context;
use crate::output::{size, span, table};

/// `ark queue`.
pub(crate) async fn queue(context: &Context) -> Result<(), Failure> {
    let queue = context.client().await?.queue().await?;
    context.ui.show(&queue, queue_table)
}

/// `ark hosts`.
pub(crate) async fn hosts(context: &Context) -> Result<(), Failure> {
    let list = context.client().await?.hosts().await?;
    context.ui.show(&list, host_table)
}

/// `ark quota`: lists owners, shows one, or sets or clears what it may have.
pub(crate) async fn quota(context: &Context, args: &QuotaArgs) -> Result<(), Failure> {
    let client = context.client().await?;
    let Some(owner) = &args.owner else {
        let list = client.owners().await?;
        return context.ui.show(&list, owner_table);
    };
    let owner = owner.as_ref();
    let quota = Quota { agents: args.agents, memory_mib: args.memory, vcpus: args.vcpus };
    let now = if args.clear {
        client.delete_quota(owner).await?;
        client.owner(owner).await?
    } else if quota == Quota::default() {
        client.owner(owner).await?
    } else {
        client.set_quota(owner, &quota).await?
    };
    context.ui.show(&now, |owner| owner_table(&OwnerList { owners: vec![owner.clone()] }))
}

fn memory(mib: u64) -> String {
    size(mib.saturating_mul(1 << 20))
}

/// All of it in three words.
fn amount(amount: &Resources) -> [String; 3] {
    [amount.agents.to_string(), memory(amount.memory_mib), amount.vcpus.to_string()]
}

fn queue_table(queue: &RequestQueue) -> String {
    let row = |request: &WaitingRequest| {
        let [agents, memory, vcpus] = amount(&request.needs);
        let timeout = span(request.timeout_ms);
        [
            request.position.to_string(),
            request.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            request.owner.to_string(),
            request.priority.to_string(),
            agents,
            memory,
            vcpus,
            format!("{} of {timeout}", span(request.waited_ms)),
            request.missing.clone(),
        ]
    };
    let rows: Vec<_> = queue.waiting.iter().map(row).collect();
    let headings =
        ["POSITION", "NAME", "OWNER", "PRIORITY", "AGENTS", "MEMORY", "VCPUS", "WAITED", "MISSING"];
    table(headings, &rows)
}

fn host_table(list: &HostList) -> String {
    let row = |host: &Host| {
        let of = |reserved: String, limit: String| format!("{reserved} of {limit}");
        let ([agents, memory_reserved, vcpus], [max_agents, memory_limit, max_vcpus]) =
            (amount(&host.reserved), amount(&host.limit));
        let ratios = host.overcommit;
        [
            host.name.clone(),
            of(agents, max_agents),
            of(memory_reserved, memory_limit),
            of(vcpus, max_vcpus),
            format!("memory {}x, cpu {}x, forks {}x", ratios.memory, ratios.cpu, ratios.forks),
            of(memory(host.used_memory_mib), memory(host.capacity.memory_mib)),
        ]
    };
    let rows: Vec<_> = list.hosts.iter().map(row).collect();
    table(["HOST", "AGENTS", "MEMORY", "VCPUS", "OVER-COMMIT", "REALLY USED"], &rows)
}

fn owner_table(list: &OwnerList) -> String {
    let row = |owner: &OwnerQuota| {
        let of = |has: String, bound: Option<String>| match bound {
            Some(bound) => format!("{has} of {bound}"),
            None => has,
        };
        let [agents, memory_reserved, vcpus] = amount(&owner.reserved);
        let quota = owner.quota;
        [
            owner.owner.to_string(),
            of(agents, quota.agents.map(|n| n.to_string())),
            of(memory_reserved, quota.memory_mib.map(memory)),
            of(vcpus, quota.vcpus.map(|n| n.to_string())),
            owner.waiting.agents.to_string(),
        ]
    };
    let rows: Vec<_> = list.owners.iter().map(row).collect();
    table(["OWNER", "AGENTS", "MEMORY", "VCPUS", "WAITING"], &rows)
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    #[test]
    fn tables_show_what_is_there_and_what_may_be() {
        let needs = json!({ "agents": 2, "memory_mib": 512, "vcpus": 2 });
        let queue = from_value(json!({ "capacity": 9, "waiting": [{
            "position": 1, "name": "a1", "owner": "team", "priority": -5, "needs": needs, "missing": "memory",
            "waited_ms": 1500, "timeout_ms": 30000,
        }]}));
        assert_eq!(
            queue_table(&queue.unwrap()),
            "POSITION  NAME  OWNER  PRIORITY  AGENTS  MEMORY   VCPUS  WAITED       MISSING\n\
             1         a1    team   -5        2       512 MiB  2      1 s of 30 s  memory\n"
        );
        let limit = json!({ "agents": 9, "memory_mib": 4096, "vcpus": 8 });
        let host = from_value(json!({ "hosts": [{
            "name": "local", "capacity": { "agents": 9, "memory_mib": 2048, "vcpus": 4 }, "limit": limit, "reserved": needs,
            "overcommit": { "memory": 2.0, "cpu": 2.0, "forks": 8.0 }, "free": needs, "used_memory_mib": 1024,
        }]}));
        assert_eq!(
            host_table(&host.unwrap()),
            "HOST   AGENTS  MEMORY              VCPUS   OVER-COMMIT                  REALLY USED\n\
             local  2 of 9  512 MiB of 4.0 GiB  2 of 8  memory 2x, cpu 2x, forks 8x  1.0 GiB of 2.0 GiB\n"
        );
        let owner = from_value(json!({ "owners": [{
            "owner": "team", "quota": { "agents": 3, "memory_mib": 1024 }, "reserved": needs,
            "waiting": { "agents": 1, "memory_mib": 1, "vcpus": 1 },
        }]}));
        assert_eq!(
            owner_table(&owner.unwrap()),
            "OWNER  AGENTS  MEMORY              VCPUS  WAITING\n\
             team   2 of 3  512 MiB of 1.0 GiB  2      1\n"
        );
    }
}
