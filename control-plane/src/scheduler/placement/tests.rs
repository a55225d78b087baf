//! The decision against one that looks at every agent on every host.

use proptest::prelude::*;

use super::*;

/// An agent that is placed.
#[derive(Clone, Debug)]
struct Placed {
    host: HostId,
    request: Request,
}

/// The same decision by the rules of the module's documentation, from the agents themselves.
fn naive(
    limits: &[Resources],
    placed: &[Placed],
    warm: &[(usize, AgentName)],
    request: &Request,
) -> Result<HostId, Misfit> {
    let on = |host: usize| placed.iter().filter(move |agent| agent.host == HostId(host));
    let used =
        |host: usize| on(host).fold(Resources::default(), |used, agent| used.plus(agent.request.needs));
    let free = |host: usize| limits[host].minus(used(host));
    let of_group = |host: usize| match &request.apart {
        Some((group, _)) => {
            on(host).filter(|a| a.request.apart.as_ref().is_some_and(|(g, _)| g == group)).count()
        }
        None => 0,
    };
    let is_strict = matches!(request.apart, Some((_, Spread::Hard)));
    let fitting = || (0..limits.len()).filter(|host| request.needs.is_within(&free(*host)));
    let is_cold = |host: usize| match &request.template {
        Some(template) => !warm.iter().any(|(at, name)| *at == host && name == template),
        None => true,
    };
    let best = fitting()
        .filter(|host| !is_strict || of_group(*host) == 0)
        .min_by_key(|host| (of_group(*host), is_cold(*host), share(used(*host), limits[*host]), *host));
    best.map(HostId).ok_or_else(|| {
        let most = |pick: &dyn Fn(usize) -> Resources| {
            (0..limits.len()).map(pick).fold(Resources::default(), |m, r| Resources {
                agents: m.agents.max(r.agents),
                memory_mib: m.memory_mib.max(r.memory_mib),
                vcpus: m.vcpus.max(r.vcpus),
            })
        };
        let (largest, most_free) = (most(&|host| limits[host]), most(&free));
        if let Some(lack) = Lack::first(request.needs, largest, largest) {
            let free = Lack::of(lack.resource, most_free);
            return Misfit::Never(Lack { free, ..lack });
        }
        if fitting().next().is_some() {
            return Misfit::Apart(request.apart.clone().unwrap().0);
        }
        Lack::first(request.needs, most_free, largest).map_or(Misfit::Scattered, Misfit::Full)
    })
}

#[derive(Clone, Debug)]
enum Step {
    /// Place it, and reserve it where it fits.
    Place(Request),
    /// Reserve it there whatever is free: an agent that was found alive.
    Claim(usize, Request),
    /// The n-th agent ends.
    End(usize),
    Warm(usize, AgentName, bool),
}

fn name(prefix: &'static str) -> impl Strategy<Value = AgentName> {
    (0..3_u8).prop_map(move |n| format!("{prefix}{n}").parse().unwrap())
}

fn request() -> impl Strategy<Value = Request> {
    let apart = proptest::option::of((name("g"), prop_oneof![Just(Spread::Soft), Just(Spread::Hard)]));
    (1..6_u64, 1..5_u64, apart, proptest::option::of(name("t"))).prop_map(
        |(memory, vcpus, apart, template)| Request {
            needs: Resources { agents: 1, memory_mib: memory * 64, vcpus },
            apart,
            template,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => request().prop_map(Step::Place),
        1 => (0..200_usize, request()).prop_map(|(host, request)| Step::Claim(host, request)),
        2 => (0..200_usize).prop_map(Step::End),
        1 => (0..200_usize, name("t"), any::<bool>()).prop_map(|(host, t, warm)| Step::Warm(host, t, warm)),
    ]
}

fn limits() -> impl Strategy<Value = Vec<Resources>> {
    let limit = (1..8_u64, 0..12_u64, 0..10_u64).prop_map(|(agents, memory, vcpus)| Resources {
        agents,
        memory_mib: memory * 128,
        vcpus,
    });
    // Around the width of a word, too.
    prop_oneof![proptest::collection::vec(limit.clone(), 0..9), proptest::collection::vec(limit, 60..140)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn the_index_decides_as_one_that_looks_at_every_agent(
        limits in limits(),
        steps in proptest::collection::vec(step(), 1..120),
    ) {
        let mut hosts = Hosts::new(&limits);
        let (mut placed, mut warm): (Vec<Placed>, Vec<(usize, AgentName)>) = Default::default();
        for step in steps {
            match step {
                Step::Place(request) => {
                    let decided = place(&hosts, &request);
                    prop_assert_eq!(&decided, &naive(&limits, &placed, &warm, &request));
                    if let Ok(host) = decided {
                        hosts.take(host, &request);
                        placed.push(Placed { host, request });
                    }
                }
                Step::Claim(at, request) if !limits.is_empty() => {
                    let host = HostId(at % limits.len());
                    hosts.take(host, &request);
                    placed.push(Placed { host, request });
                }
                Step::End(at) if !placed.is_empty() => {
                    let Placed { host, request } = placed.swap_remove(at % placed.len());
                    hosts.give(host, &request);
                }
                Step::Warm(at, template, is_warm) if !limits.is_empty() => {
                    let at = at % limits.len();
                    hosts.set_warm(HostId(at), &template, is_warm);
                    warm.retain(|known| *known != (at, template.clone()));
                    if is_warm {
                        warm.push((at, template));
                    }
                }
                Step::Claim(..) | Step::End(_) | Step::Warm(..) => {}
            }
        }
        for agent in &placed {
            hosts.give(agent.host, &agent.request);
        }
        prop_assert!(hosts.groups.is_empty(), "a group without agents is forgotten");
        let templates: std::collections::BTreeSet<_> = warm.iter().map(|(_, template)| template).collect();
        prop_assert_eq!(hosts.warm.len(), templates.len(), "and a template that no host has warm");
        let nothing = Resources::default();
        prop_assert!((0..limits.len()).all(|host| hosts.used(HostId(host)) == nothing));
    }
}

fn agents_of(memory_mib: u64) -> Request {
    Request { needs: Resources { agents: 1, memory_mib, vcpus: 1 }, apart: None, template: None }
}

#[test]
fn what_is_missing_is_told() {
    let limit = |memory_mib, vcpus| Resources { agents: 9, memory_mib, vcpus };
    let mut hosts = Hosts::new(&[limit(1000, 4), limit(500, 8)]);
    let why = |hosts: &Hosts, request: &Request| place(hosts, request).unwrap_err();
    let lack = |asked, free| Lack { resource: Resource::Memory, asked, free, limit: 1000 };
    assert_eq!(why(&hosts, &agents_of(1001)), Misfit::Never(lack(1001, 1000)));
    hosts.take(HostId(0), &agents_of(700));
    assert_eq!(why(&hosts, &agents_of(600)), Misfit::Full(lack(600, 500)));
    let wide = Request { needs: Resources { agents: 1, memory_mib: 400, vcpus: 8 }, ..agents_of(0) };
    assert_eq!(place(&hosts, &wide), Ok(HostId(1)));
    hosts.take(HostId(1), &agents_of(300));
    hosts.take(
        HostId(1),
        &Request { needs: Resources { agents: 0, memory_mib: 0, vcpus: 4 }, ..agents_of(0) },
    );
    let tall = Request { needs: Resources { agents: 1, memory_mib: 250, vcpus: 3 }, ..agents_of(0) };
    assert_eq!(place(&hosts, &tall), Ok(HostId(0)));
    hosts.take(
        HostId(0),
        &Request { needs: Resources { agents: 0, memory_mib: 60, vcpus: 1 }, ..agents_of(0) },
    );
    hosts.give(HostId(1), &agents_of(0));
    let scattered = Request { needs: Resources { agents: 1, memory_mib: 220, vcpus: 4 }, ..agents_of(0) };
    assert_eq!(why(&hosts, &scattered), Misfit::Scattered);
}

#[test]
fn a_strict_group_takes_every_host_once() {
    let mut hosts = Hosts::new(&[Resources { agents: 9, memory_mib: 900, vcpus: 9 }; 3]);
    let group: AgentName = "web".parse().unwrap();
    let strict = Request { apart: Some((group.clone(), Spread::Hard)), ..agents_of(10) };
    for expected in 0..3 {
        let host = place(&hosts, &strict).unwrap();
        assert_eq!(host, HostId(expected));
        hosts.take(host, &strict);
    }
    assert_eq!(place(&hosts, &strict), Err(Misfit::Apart(group.clone())));
    let soft = Request { apart: Some((group, Spread::Soft)), ..agents_of(10) };
    assert_eq!(place(&hosts, &soft), Ok(HostId(0)));
}
