//! `ark pool`: how many forks of each template stand ready.

use ark_types::agent::AgentName;
use ark_types::pool::{Pool, PoolList, PoolPolicy};

use crate::args::{PoolAction, PoolSetArgs};
use crate::failure::{Failure, summed_up};
use crate::host::Context;
use crate::output::{printable, size, span, table};

/// `ark pool …`.
pub(crate) async fn perform(context: &Context, action: PoolAction) -> Result<(), Failure> {
    match action {
        PoolAction::Ls => ls(context).await,
        PoolAction::Set(args) => set(context, &args).await,
        PoolAction::Show { template } => {
            let pool = context.client().await?.pool(template.as_ref()).await?;
            context.ui.show(&pool, card)
        }
        PoolAction::Rm { templates } => rm(context, &templates).await,
    }
}

async fn ls(context: &Context) -> Result<(), Failure> {
    let list = context.client().await?.pools().await?;
    context.ui.show(&list, pool_table)
}

async fn set(context: &Context, args: &PoolSetArgs) -> Result<(), Failure> {
    let target_wait_ms = u64::try_from(args.target_wait.as_millis()).unwrap_or(u64::MAX);
    let policy = PoolPolicy { min: args.min, max: args.max, target_wait_ms };
    let pool = context.client().await?.set_pool(args.template.as_ref(), &policy).await?;
    context.ui.show(&pool, |pool| pool_table(&PoolList { pools: vec![pool.clone()] }))
}

/// Every pool is tried; what fails is told for each.
async fn rm(context: &Context, templates: &[AgentName]) -> Result<(), Failure> {
    let client = context.client().await?;
    let (mut removed, mut failures) = (Vec::new(), Vec::new());
    for template in templates {
        match client.delete_pool(template.as_ref()).await {
            Ok(()) => removed.push(template.to_string()),
            Err(error) => failures.push(error.into()),
        }
    }
    context.ui.show_removed(&removed.iter().collect::<Vec<_>>())?;
    summed_up(context.ui, failures, templates.len(), "pools were not removed")
}

/// The policy in three words.
fn bounds(policy: Option<PoolPolicy>) -> [String; 3] {
    match policy {
        Some(PoolPolicy { min, max, target_wait_ms }) => {
            [min.to_string(), max.to_string(), span(target_wait_ms)]
        }
        None => ["-"; 3].map(str::to_owned),
    }
}

/// The waits, half of them and nearly all.
fn wait(pool: &Pool) -> [String; 2] {
    pool.wait.map_or(["-"; 2].map(str::to_owned), |wait| [span(wait.p50_ms), span(wait.p99_ms)])
}

fn pool_table(list: &PoolList) -> String {
    let row = |pool: &Pool| {
        let [min, max, target] = bounds(pool.policy);
        let [p50, p99] = wait(pool);
        [
            pool.template.to_string(),
            format!("{} of {}", pool.standbys, pool.wanted),
            min,
            max,
            target,
            pool.hits.to_string(),
            pool.misses.to_string(),
            format!("{:.2}/s", pool.demand_per_s),
            p50,
            p99,
        ]
    };
    let rows: Vec<_> = list.pools.iter().map(row).collect();
    let headings = [
        "TEMPLATE",
        "READY",
        "MIN",
        "MAX",
        "TARGET WAIT",
        "HITS",
        "MISSES",
        "DEMAND",
        "WAIT P50",
        "WAIT P99",
    ];
    table(headings, &rows)
}

/// Everything about one, a line each.
fn card(pool: &Pool) -> String {
    let [min, max, target] = bounds(pool.policy);
    let [p50, p99] = wait(pool);
    let policy = match pool.policy {
        Some(_) => format!("min {min}, max {max}, target wait {target}"),
        None => "none: as every template in use".to_owned(),
    };
    let reserved = pool.reserved;
    let memory = size(reserved.memory_mib.saturating_mul(1 << 20));
    let mut rows = vec![
        ["template", pool.template.as_ref()].map(str::to_owned),
        ["policy", &policy].map(str::to_owned),
        ["ready", &format!("{} of {}", pool.standbys, pool.wanted)].map(str::to_owned),
        ["reserved", &format!("{memory}, {} processors", reserved.vcpus)].map(str::to_owned),
        ["claims", &format!("{} found one ready, {} did not", pool.hits, pool.misses)].map(str::to_owned),
        ["demand", &format!("{:.2} per second", pool.demand_per_s)].map(str::to_owned),
        ["wait", &format!("p50 {p50}, p99 {p99}")].map(str::to_owned),
        ["to make one", &pool.make_ms.map_or("-".to_owned(), span)].map(str::to_owned),
    ];
    if let Some(failure) = &pool.failure {
        rows.push(["failure", &printable(failure).replace('\n', " ")].map(str::to_owned));
    }
    rows.iter().map(|[what, value]| format!("{what:<11}  {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn pool() -> Pool {
        from_value(json!({
            "template": "py", "policy": { "min": 2, "max": 20, "target_wait_ms": 50 }, "standbys": 3, "wanted": 4,
            "reserved": { "agents": 3, "memory_mib": 96, "vcpus": 3 }, "hits": 17, "misses": 1, "demand_per_s": 1.5,
            "make_ms": 120, "wait": { "agents": 18, "p50_ms": 9, "p99_ms": 130 }, "failure": "no\u{1b}[2J room",
        }))
        .unwrap()
    }

    fn unset() -> Pool {
        Pool { policy: None, make_ms: None, wait: None, failure: None, ..pool() }
    }

    #[test]
    fn a_table_shows_what_is_ready_and_how_long_agents_waited() {
        assert_eq!(
            pool_table(&PoolList { pools: vec![pool(), unset()] }),
            "TEMPLATE  READY   MIN  MAX  TARGET WAIT  HITS  MISSES  DEMAND  WAIT P50  WAIT P99\n\
             py        3 of 4  2    20   50 ms        17    1       1.50/s  9 ms      130 ms\n\
             py        3 of 4  -    -    -            17    1       1.50/s  -         -\n"
        );
    }

    #[test]
    fn a_card_tells_everything_and_moves_no_cursor() {
        assert_eq!(
            card(&pool()),
            "template     py\n\
             policy       min 2, max 20, target wait 50 ms\n\
             ready        3 of 4\n\
             reserved     96 MiB, 3 processors\n\
             claims       17 found one ready, 1 did not\n\
             demand       1.50 per second\n\
             wait         p50 9 ms, p99 130 ms\n\
             to make one  120 ms\n\
             failure      no\\u{1b}[2J room\n"
        );
        assert!(card(&unset()).contains("policy       none: as every template in use\n"));
    }
}
