//! What was measured, as it is written to `report.json`, and as tables. docs/benchmarks.md says what each field means.

use std::fmt::Write as _;
use std::fs;

use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::measure::Spread;
use super::path::{Effort, MANY, Row, Scope};
use super::pods::PodsReport;
use crate::error::Result;

/// What the part inside the lab hands back.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    pub effort: Effort,
    pub alone: u32,
    pub pods: PodsReport,
    pub path: Vec<Row>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    pub quick: bool,
    pub machine: Machine,
    #[serde(flatten)]
    pub measured: Measured,
    pub ratios: Ratios,
}

/// Where the figures come from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    /// How many threads wanted a processor, on average over the minute before the run ended; above 1 or 2 something else
    /// ran too.
    pub load: f64,
}

/// p50 with the most pods over p50 with the fewest, the worse of both scopes; and the two figures of ADD.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ratios {
    pub pods: usize,
    pub flat: Option<f64>,
    pub pod_rules: Option<f64>,
    pub bridge: Option<f64>,
    pub vxlan: Option<f64>,
    pub add_over_floor: Option<f64>,
    pub burst_p99_ms: f64,
}

impl Report {
    pub fn of(measured: Measured, quick: bool) -> Result<Self> {
        let pods = measured.path.iter().map(|row| row.pods).max().unwrap_or_default();
        let worse = |layout: Layout| {
            let rows = measured.path.iter().filter(|row| row.layout == layout && row.pods == pods);
            rows.filter_map(|row| row.over_few).max_by(f64::total_cmp)
        };
        let ratios = Ratios {
            pods,
            flat: worse(Layout::Flat),
            pod_rules: worse(Layout::PodRules),
            bridge: worse(Layout::Bridge),
            vxlan: worse(Layout::Vxlan),
            add_over_floor: measured.pods.add_over_floor,
            burst_p99_ms: measured.pods.burst.add_ms.p99,
        };
        Ok(Self { quick, machine: Machine::this(), measured, ratios })
    }

    /// Rows as they are read: by scope, then by layout, then by pods.
    pub fn rows(&self, scope: Scope, layout: Layout) -> Vec<&Row> {
        let mut rows: Vec<&Row> =
            self.measured.path.iter().filter(|row| row.scope == scope && row.layout == layout).collect();
        rows.sort_by_key(|row| row.pods);
        rows
    }

    /// The layouts that were measured, in the order they are shown.
    pub fn layouts(&self) -> Vec<Layout> {
        let mut layouts: Vec<Layout> = self.measured.path.iter().map(|row| row.layout).collect();
        layouts.sort();
        layouts.dedup();
        layouts
    }

    pub fn text(&self) -> String {
        let machine = &self.machine;
        let mut text =
            format!("{} × {}, Linux {}, load {:.1}\n", machine.cores, machine.cpu, machine.kernel, machine.load);
        for scope in Scope::BOTH {
            self.path_table(&mut text, scope);
        }
        self.pods_table(&mut text);
        text
    }

    fn path_table(&self, text: &mut String, scope: Scope) {
        if !self.measured.path.iter().any(|row| row.scope == scope) {
            return;
        }
        let _ = writeln!(
            text,
            "\n{:<22} {:>6} {:>8} {:>8} {:>8} {:>9} {:>12} {:>12}",
            format!("pod to pod {}", scope.text()),
            "pods",
            "p50 µs",
            "p90",
            "p99",
            "over few",
            "1 stream",
            format!("{MANY} streams"),
        );
        for layout in self.layouts() {
            let mut name = layout.name();
            for row in self.rows(scope, layout) {
                let rtt = row.rtt_us;
                let over = row.over_few.map_or_else(|| "-".to_owned(), |over| format!("{over:.3}"));
                let _ = writeln!(
                    text,
                    "  {name:<22} {:>4} {:>8.1} {:>8.1} {:>8.1} {over:>9} {:>7.1} Gb/s {:>7.1} Gb/s",
                    row.pods, rtt.p50, rtt.p90, rtt.p99, row.one_stream_gbit_s, row.many_streams_gbit_s
                );
                name = "";
            }
        }
    }

    fn pods_table(&self, text: &mut String) {
        let pods = &self.measured.pods;
        let _ = writeln!(
            text,
            "\n{:<42} {:>8} {:>8} {:>8} {:>8}",
            format!("{}, exec to exit", pods.plugin),
            "p50 ms",
            "p90",
            "p99",
            "max"
        );
        let mut line = |what: String, times: &Spread| {
            let Spread { p50, p90, p99, max } = times;
            let _ = writeln!(text, "  {what:<40} {p50:>8.2} {p90:>8.2} {p99:>8.2} {max:>8.2}");
        };
        let burst = &pods.burst;
        line("ADD alone".into(), &pods.add_ms);
        line("DEL alone".into(), &pods.del_ms);
        line("VERSION: starting and ending alone".into(), &pods.start_ms);
        if let Some(floor) = &pods.floor {
            line("floor: the netlink messages of an ADD".into(), &floor.netlink_ms);
            line("floor: AddNetwork over gRPC".into(), &floor.grpc_add_ms);
            line("(Status over gRPC)".into(), &floor.grpc_status_ms);
        }
        line(format!("{} ADDs at once", burst.pods), &burst.add_ms);
        line(format!("{} DELs at once", burst.pods), &burst.del_ms);
        if let (Some(over), Some(floor)) = (pods.add_over_floor, &pods.floor) {
            let _ = writeln!(text, "  an ADD takes {over:.2} × its floor of {:.2} ms", floor.total_ms);
        }
        let _ = writeln!(text, "  {} ADDs at once: {}", burst.pods, burst.bound);
    }

    /// The last line.
    pub fn summary(&self) -> String {
        let Ratios { pods, flat, pod_rules, bridge, vxlan, add_over_floor, burst_p99_ms } = &self.ratios;
        let say = |ratio: &Option<f64>| ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        let burst = self.measured.pods.burst.pods;
        if flat.is_none() {
            let PodsReport { add_ms, del_ms, .. } = &self.measured.pods;
            return format!(
                "bench: add_p50_ms={:.1} del_p50_ms={:.1} burst{burst}_p99_ms={burst_p99_ms:.0}",
                add_ms.p50, del_ms.p50
            );
        }
        format!(
            "bench: p50_{pods}_over_1={} addon={} bridge={} vxlan={} add_over_floor={} burst{burst}_p99_ms={burst_p99_ms:.0}",
            say(flat),
            say(pod_rules),
            say(bridge),
            say(vxlan),
            say(add_over_floor),
        )
    }
}

impl Machine {
    fn this() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let model =
            cpuinfo.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
        Self {
            cpu: model.unwrap_or("unknown").to_owned(),
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            load: read("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or_default(),
        }
    }
}
