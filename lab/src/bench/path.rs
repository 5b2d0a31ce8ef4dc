//! The path from pod to pod: every layout with few pods and with many, measured in turns.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::layout::{Layout, Node, Pod};
use super::measure::{PingPong, Spread, pin, throughput};
use super::site::Site;
use crate::error::{Error, Result};

/// Streams of the row "many".
pub const MANY: usize = 8;

/// How much is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Effort {
    /// Pods on the node, ascending. The first is the one the others are compared with.
    pub pods: Vec<usize>,
    /// Turns of all layouts, per number of pods.
    pub rounds: u32,
    /// Round trips per turn.
    pub trips: u32,
    /// How long a stream runs per turn.
    pub stream_ms: u64,
    pub stream_rounds: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    SameNode,
    AcrossNodes,
}

impl Scope {
    pub const BOTH: [Self; 2] = [Self::SameNode, Self::AcrossNodes];

    pub fn text(self) -> &'static str {
        match self {
            Self::SameNode => "on a node",
            Self::AcrossNodes => "across two nodes",
        }
    }
}

/// One layout with so many pods on the node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub layout: Layout,
    pub scope: Scope,
    pub pods: usize,
    /// A datagram there and one back.
    pub rtt_us: Spread,
    /// p50 of the same layout on a node with the measured pods alone, taken in the same turns.
    pub few_p50_us: Option<f64>,
    /// The p50 over that of few pods.
    pub over_few: Option<f64>,
    pub one_stream_gbit_s: f64,
    pub many_streams_gbit_s: f64,
}

/// Two pods between which is measured, and two of the same layout on a node without a crowd to compare with.
pub struct Contender {
    pub layout: Layout,
    pub scope: Scope,
    pub pods: [Pod; 2],
    pub few: Option<[Pod; 2]>,
}

/// A layout on two nodes, of which the first has the crowd.
struct Scene {
    layout: Layout,
    crowded: Node,
    other: Node,
}

impl Scene {
    fn pods(&self, scope: Scope) -> Result<[Pod; 2]> {
        let far = match scope {
            Scope::SameNode => self.crowded.measured.get(1),
            Scope::AcrossNodes => self.other.measured.first(),
        };
        match (self.crowded.measured.first(), far) {
            (Some(near), Some(far)) => Ok([near.clone(), far.clone()]),
            _ => Err(Error::refused("a pod to be measured is missing")),
        }
    }
}

/// Measures all layouts that are compared, in a mount namespace of the caller's own. Needs a tokio runtime, and blocks it
/// while it measures.
pub async fn measure(effort: &Effort, tell: &dyn Fn(&str)) -> Result<Vec<Row>> {
    let most = effort.pods.iter().copied().max().unwrap_or_default();
    let mut site = Site::new().await?;
    // Of each layout one scene that keeps the measured pods alone, and one that grows.
    let few = scenes(&mut site, 1).await?;
    let mut many = scenes(&mut site, most).await?;
    let mut contenders = Vec::new();
    for (few, many) in few.iter().zip(&many) {
        for scope in Scope::BOTH {
            let (pods, few) = (many.pods(scope)?, Some(few.pods(scope)?));
            contenders.push(Contender { layout: many.layout, scope, pods, few });
        }
    }
    let mut rows = Vec::new();
    for pods in &effort.pods {
        tell(&format!("{pods} pods on the node"));
        for scene in &mut many {
            scene.crowded.grow(*pods).await?;
        }
        rows.extend(compare(effort, *pods, &contenders)?);
    }
    Ok(rows)
}

/// One scene of each layout, with addresses for so many pods.
async fn scenes(site: &mut Site, pods: usize) -> Result<Vec<Scene>> {
    let mut machines = Vec::new();
    for layout in Layout::COMPARED {
        machines.push((layout, site.launch(pods).await?, site.launch(1).await?));
    }
    site.connect().await?;
    let mut scenes = Vec::new();
    for (layout, crowded, other) in machines {
        let crowded = Node::new(layout, site.machine(&crowded).await?, 0, 2).await?;
        let other = Node::new(layout, site.machine(&other).await?, 1, 1).await?;
        crowded.tunnel_to(&other).await?;
        other.tunnel_to(&crowded).await?;
        scenes.push(Scene { layout, crowded, other });
    }
    Ok(scenes)
}

/// Measures the contenders in turns, so that whatever else the machine does meets all of them.
pub fn compare(effort: &Effort, pods: usize, contenders: &[Contender]) -> Result<Vec<Row>> {
    let mut timed = Vec::new();
    for contender in contenders {
        for [near, far] in [Some(&contender.pods), contender.few.as_ref()].into_iter().flatten() {
            timed.push((PingPong::between(near, far)?, Vec::new()));
        }
    }
    // On a thread of its own, because it stays on one processor, and streams are to have them all.
    let round_trips = || -> Result<()> {
        pin()?;
        for _ in 0..effort.rounds {
            for (sockets, rounds) in &mut timed {
                rounds.push(sockets.round(effort.trips)?);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(round_trips).join())
        .map_err(|_| Error::refused("the measurement panicked"))??;
    let mut spreads = timed.iter().map(|(_, rounds)| Spread::typical(rounds));

    let mut rows = Vec::new();
    for contender in contenders {
        let rtt_us = spreads.next().unwrap_or_default();
        let few = contender.few.as_ref().and_then(|_| spreads.next()).map(|few| few.p50);
        rows.push(Row {
            layout: contender.layout,
            scope: contender.scope,
            pods,
            rtt_us,
            few_p50_us: few,
            over_few: few.map(|few| rtt_us.p50 / few),
            one_stream_gbit_s: 0.0,
            many_streams_gbit_s: 0.0,
        });
    }
    let mut streams = vec![[Vec::new(), Vec::new()]; contenders.len()];
    for _ in 0..effort.stream_rounds {
        for (contender, [one, many]) in contenders.iter().zip(&mut streams) {
            let [near, far] = &contender.pods;
            let time = Duration::from_millis(effort.stream_ms);
            one.push(throughput(near, far, 1, time)?);
            many.push(throughput(near, far, MANY, time)?);
        }
    }
    for (row, [one, many]) in rows.iter_mut().zip(streams) {
        (row.one_stream_gbit_s, row.many_streams_gbit_s) = (Spread::of(one).p50, Spread::of(many).p50);
    }
    Ok(rows)
}
