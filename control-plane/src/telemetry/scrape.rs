//! The text of `GET /metrics`: what was counted, and what is looked at for it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use ark_types::agent::AgentState;
use ark_types::model::MODEL_PREFIX;
use ark_types::stats::AgentStats;
use prometheus_client::encoding::prometheus_text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{Ahead, Labels, Telemetry};
use crate::core::Core;
use crate::models;
use crate::services::view;
use crate::stats::{self, FRESH_ENOUGH};
use crate::traces;

/// Media type of the answer: Prometheus' text format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

type Gauges<const N: usize> = Family<Labels<N>, Gauge<f64, AtomicU64>>;
type Totals<const N: usize> = Family<Labels<N>, Counter<f64, AtomicU64>>;

/// Everything that is measured, as text.
///
/// # Errors
/// None that is known: writing text to memory does not fail.
pub async fn scrape(core: &Core) -> Result<String, fmt::Error> {
    let settings = core.telemetry.settings();
    let labels =
        settings.labels.iter().map(|(name, value)| (String::from(name.clone()).into(), value.clone().into()));
    let mut registry = Registry::with_labels(labels);
    counted(&mut registry, &core.telemetry);
    seen(&mut registry, core);
    services(&mut registry, core);
    inference(&mut registry, core);
    process(&mut registry, core);
    if settings.agent_series.get() > 0 {
        let list = core.stats.all(&core.registry, FRESH_ENOUGH).await;
        let count = settings.agent_series.count().min(list.agents.len());
        let (told, others) = list.agents.split_at(count);
        let left_out = u64::from(list.left_out) + u64::try_from(others.len()).unwrap_or(u64::MAX);
        agents(&mut registry, told, left_out);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// What was counted where it happened.
fn counted(registry: &mut Registry, telemetry: &Telemetry) {
    let Telemetry {
        creates,
        phases,
        claims,
        vmm_exits,
        requests,
        request_time,
        tasks,
        task_wait,
        inference,
        settings: _,
    } = telemetry;
    registry.register(
        "ark_creates",
        "Agents asked for, by what they were to be made of and what came of it",
        creates.clone(),
    );
    registry.register(
        "ark_phase_seconds",
        "Time that each step of an agent's start, and work in it, took",
        phases.clone(),
    );
    registry.register("ark_pool_claims", "Wishes for what is made ahead of need", claims.clone());
    registry.register("ark_vmm_exits", "VMMs that ended, by reason", vmm_exits.clone());
    registry.register("ark_tasks", "Tasks that ended, by what came of them", tasks.clone());
    registry.register(
        "ark_task_wait_seconds",
        "Time from a task's creation to the beginning of its first attempt",
        task_wait.clone(),
    );
    inference.register(registry);
    registry.register("ark_http_requests", "Requests by route, method and status", requests.clone());
    registry.register(
        "ark_http_request_seconds",
        "Time from a request to the head of its reply",
        request_time.clone(),
    );
}

/// What is there now.
fn seen(registry: &mut Registry, core: &Core) {
    let states: Gauges<1> = Family::default();
    let all = [
        AgentState::Creating,
        AgentState::Running,
        AgentState::Paused,
        AgentState::Stopping,
        AgentState::Stopped,
        AgentState::Failed,
    ];
    for state in all {
        drop(states.get_or_create(&[("state", state.to_string().into())]));
    }
    let (mut oldest, frozen) = (0, Gauge::<i64>::default());
    for handle in core.registry.all() {
        let agent = handle.agent();
        if handle.is_frozen() {
            frozen.inc();
        }
        states.get_or_create(&[("state", agent.state.to_string().into())]).inc();
        if let (AgentState::Running, Some(beat)) = (agent.state, &agent.heartbeat) {
            oldest = oldest.max(crate::host::unix_ms().saturating_sub(beat.at_unix_ms));
        }
    }
    registry.register("ark_agents", "Agents that are known, by state", states);
    registry.register("ark_agents_frozen", "Agents that stand still while a model thinks for them", frozen);
    let age = seconds(Duration::from_millis(oldest));
    registry.register(
        "ark_heartbeat_age_seconds_max",
        "Age of the heartbeat that is oldest among running agents",
        age,
    );

    let (sizes, ready) = core.pool.levels();
    let (wanted, there): (Gauges<1>, Gauges<1>) = <_>::default();
    for (kind, wanted_count, count) in
        [(Ahead::Prepared, sizes.prepared, ready.prepared), (Ahead::Standby, sizes.standbys, ready.standbys)]
    {
        wanted.get_or_create(&[("kind", kind.label().into())]).set(float(wanted_count));
        there.get_or_create(&[("kind", kind.label().into())]).set(float(count));
    }
    registry.register(
        "ark_pool_target",
        "What is to be made ahead of need; standbys of each template in use",
        wanted,
    );
    registry.register("ark_pool_ready", "What is made ahead of need and waits", there);
    pools(registry, core);

    let (queued, running) = core.tasks.levels();
    registry.register(
        "ark_tasks_queued",
        "Tasks that wait for their turn or their time",
        gauge(float(queued)),
    );
    registry.register("ark_tasks_running", "Tasks with an attempt under way", gauge(float(running)));

    let (snapshots, snapshot_bytes): (Gauges<1>, Gauges<1>) = <_>::default();
    for (kind, count, bytes) in core.snapshots.usage() {
        snapshots.get_or_create(&[("kind", kind.into())]).set(float(count));
        snapshot_bytes.get_or_create(&[("kind", kind.into())]).set(precise(bytes));
    }
    registry.register("ark_snapshots", "Snapshots on disk, by whose they are", snapshots);
    registry.register("ark_snapshot_bytes", "Bytes that snapshots hold on disk", snapshot_bytes);
}

/// Pools one by one: they are bounded in number.
fn pools(registry: &mut Registry, core: &Core) {
    let (size, wanted): (Gauges<1>, Gauges<1>) = <_>::default();
    let (hits, misses): (Totals<1>, Totals<1>) = <_>::default();
    for pool in core.pool.list() {
        let labels: Labels<1> = [("template", pool.template.to_string().into())];
        size.get_or_create(&labels).set(pool.standbys.into());
        wanted.get_or_create(&labels).set(pool.wanted.into());
        hits.get_or_create(&labels).inc_by(precise(pool.hits));
        misses.get_or_create(&labels).inc_by(precise(pool.misses));
    }
    registry.register("ark_pool_size", "Standbys of a template", size);
    registry.register("ark_pool_wanted", "Standbys that a template is to have", wanted);
    registry.register("ark_pool_hits", "Agents that were made of a standby", hits);
    registry.register("ark_pool_misses", "Agents for which there was no standby", misses);
}

/// Services one by one, which are bounded in number.
fn services(registry: &mut Registry, core: &Core) {
    let (replicas, calls): (Gauges<2>, Totals<2>) = <_>::default();
    for told in view::numbers(&core.services) {
        let service = || ("service", told.service.clone().into());
        for (state, count) in &told.replicas {
            replicas.get_or_create(&[service(), ("state", state.to_string().into())]).set(float(*count));
        }
        for (outcome, count) in told.calls {
            calls.get_or_create(&[service(), ("outcome", outcome.into())]).inc_by(precise(count));
        }
    }
    registry.register("ark_service_replicas", "Replicas of services, by state", replicas);
    registry.register("ark_service_calls", "Calls to services, by what came of them", calls);
}

/// Calls of models that are there now, by the services that serve them.
fn inference(registry: &mut Registry, core: &Core) {
    let (waiting, running, wanted): (Gauges<1>, Gauges<1>, Gauges<1>) = <_>::default();
    for (service, replicas, _) in core.services.replicas(models::is_own) {
        wanted.get_or_create(&[("service", service.to_string().into())]).set(replicas.into());
    }
    let levels = core.inference.levels();
    let served = view::numbers(&core.services).into_iter().map(|told| told.service);
    for service in served.filter(|service| service.starts_with(MODEL_PREFIX)) {
        let of = levels.iter().find(|(name, ..)| name.as_ref() == service);
        let (count, under_way) = of.map_or((0, 0), |(_, count, under_way)| (*count, *under_way));
        let labels: Labels<1> = [("service", service.into())];
        waiting.get_or_create(&labels).set(float(count));
        running.get_or_create(&labels).set(precise(under_way));
    }
    registry.register("ark_inference_waiting", "Calls of models that wait for their turn", waiting);
    registry.register("ark_inference_running", "Calls of models that are under way", running);
    registry.register("ark_inference_replicas_wanted", "VMs that a model is to have", wanted);
}

/// This very process, under the names that Prometheus' own clients give.
fn process(registry: &mut Registry, core: &Core) {
    let build: Gauges<1> = Family::default();
    build.get_or_create(&[("version", env!("CARGO_PKG_VERSION").into())]).set(1.0);
    registry.register("ark_build_info", "The arkd that answers", build);
    let this = Path::new("/proc/self");
    let cpu: Counter<f64, AtomicU64> = Counter::default();
    cpu.inc_by(precise(stats::cpu_us(this).unwrap_or_default()) / 1e6);
    registry.register("process_cpu_seconds", "Processor time that arkd has used", cpu);
    let memory = fs::read_to_string(this.join("statm")).unwrap_or_default();
    let pages = memory.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or_default();
    registry.register("process_resident_memory_bytes", "Memory of arkd", gauge(precise(pages * page_size())));
    let files = fs::read_dir(this.join("fd")).map_or(0, Iterator::count);
    registry.register("process_open_fds", "Open file descriptors of arkd", gauge(float(files)));
    let spans: Totals<1> = Family::default();
    let traces::Counts { sent, dropped } = traces::counts();
    for (outcome, count) in [("sent", sent), ("dropped", dropped)] {
        spans.get_or_create(&[("outcome", outcome.into())]).inc_by(precise(count));
    }
    registry.register("ark_trace_spans", "Spans of traces, by what became of them", spans);
    let uptime = seconds(core.started.elapsed());
    registry.register("ark_uptime_seconds", "Time since arkd started", uptime);
}

/// Agents one by one.
fn agents(registry: &mut Registry, told: &[AgentStats], left_out: u64) {
    let (cpu, exits): (Totals<2>, Totals<2>) = <_>::default();
    let (pss, rss, guest, heartbeat): (Gauges<2>, Gauges<2>, Gauges<2>, Gauges<2>) = <_>::default();
    let devices: Totals<4> = Family::default();
    for agent in told {
        let labels: Labels<2> = [("agent", agent.name.to_string().into()), ("id", agent.id.clone().into())];
        let set = |family: &Gauges<2>, value: Option<u64>, scale: f64| {
            if let Some(value) = value {
                family.get_or_create(&labels).set(precise(value) / scale);
            }
        };
        let add = |family: &Totals<2>, value: Option<u64>, scale: f64| {
            if let Some(value) = value {
                family.get_or_create(&labels).inc_by(precise(value) / scale);
            }
        };
        add(&cpu, agent.cpu_us, 1e6);
        add(&exits, agent.exits, 1.0);
        set(&pss, agent.pss_bytes, 1.0);
        set(&rss, agent.rss_bytes, 1.0);
        set(&guest, agent.guest_bytes, 1.0);
        set(&heartbeat, agent.heartbeat_age_ms, 1e3);
        count_devices(&devices, &labels, &agent.devices);
    }
    registry.register(
        "ark_agent_cpu_seconds",
        "Processor time that an agent's VMM has used, guest included",
        cpu,
    );
    registry.register("ark_agent_pss_bytes", "Memory of an agent's VMM, shared pages by their part", pss);
    registry.register("ark_agent_rss_bytes", "Memory of an agent's VMM, shared pages counted whole", rss);
    registry.register("ark_agent_guest_bytes", "Guest memory that is an agent's alone", guest);
    registry.register("ark_agent_heartbeat_age_seconds", "Age of an agent's last heartbeat", heartbeat);
    registry.register("ark_agent_exits", "VM exits that an agent's VMM handled", exits);
    registry.register("ark_agent_device", "Counters of an agent's devices", devices);
    registry.register(
        "ark_agent_series_left_out",
        "Living agents without series of their own",
        gauge(precise(left_out)),
    );
}

fn count_devices(family: &Totals<4>, labels: &Labels<2>, devices: &BTreeMap<String, BTreeMap<String, u64>>) {
    let [agent, id] = labels;
    for (device, counters) in devices {
        for (counter, value) in counters {
            let labels = [
                agent.clone(),
                id.clone(),
                ("device", device.clone().into()),
                ("counter", counter.clone().into()),
            ];
            family.get_or_create(&labels).inc_by(precise(*value));
        }
    }
}

fn gauge(value: f64) -> Gauge<f64, AtomicU64> {
    let gauge = Gauge::default();
    gauge.set(value);
    gauge
}

fn seconds(time: Duration) -> Gauge<f64, AtomicU64> {
    gauge(time.as_secs_f64())
}

/// Prometheus' numbers are floating-point ones: above 2^53 the last digits go.
#[expect(clippy::cast_precision_loss, reason = "the format has no other numbers")]
const fn precise(value: u64) -> f64 {
    value as f64
}

fn float(count: usize) -> f64 {
    precise(u64::try_from(count).unwrap_or(u64::MAX))
}

fn page_size() -> u64 {
    let known = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    known.and_then(|size| u64::try_from(size).ok()).unwrap_or(4096)
}
