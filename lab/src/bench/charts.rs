//! The pictures of a report.

use super::layout::Layout;
use super::path::{MANY, Row, Scope};
use super::pods::number;
use super::report::Report;
use super::svg::{Anchor, Svg};

const WIDTH: f64 = 920.0;
const INK: &str = "#222";
const GREY: &str = "#777";
const GRID: &str = "#ddd";
const MARGIN: f64 = 60.0;

/// Name and content of each file.
pub fn all(report: &Report) -> [(&'static str, String); 3] {
    [("latency.svg", latency(report)), ("throughput.svg", throughput(report)), ("pods.svg", pods(report))]
}

fn colour(layout: Layout) -> &'static str {
    match layout {
        Layout::Flat | Layout::Given => "#1b6ac9",
        Layout::PodRules => "#d1495b",
        Layout::Bridge => "#66a182",
        Layout::Vxlan => "#b07d12",
    }
}

/// A scale from zero, whose largest mark is round and not below any value.
struct Axis {
    step: f64,
    marks: u32,
}

impl Axis {
    fn up_to(values: impl Iterator<Item = f64>) -> Self {
        let most = values.fold(0.0, f64::max).max(1e-3);
        let rough = most / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|s| s * power).find(|s| *s >= rough).unwrap_or(rough);
        let marks = (1..=10).find(|count| f64::from(*count) * step >= most).unwrap_or(10);
        Self { step, marks }
    }

    fn end(&self) -> f64 {
        self.step * f64::from(self.marks)
    }

    /// Each mark with its share of the length.
    fn each(&self) -> impl Iterator<Item = (f64, f64)> {
        let (step, end) = (self.step, self.end());
        (0..=self.marks).map(move |mark| (f64::from(mark) * step, f64::from(mark) * step / end))
    }
}

/// Median round trip by pods on the node; a panel per scope.
fn latency(report: &Report) -> String {
    let (top, height) = (60.0, 300.0);
    let width = (WIDTH - 3.0 * MARGIN) / 2.0;
    let mut svg = Svg::new(WIDTH, top + height + 90.0);
    svg.text(
        MARGIN,
        28.0,
        Anchor::Start,
        16,
        INK,
        "Round trip of a datagram from pod to pod, p50 in µs, by pods on the node",
    );
    let rows = &report.measured.path;
    let y = Axis::up_to(rows.iter().map(|row| row.rtt_us.p50));
    let x = Axis::up_to(rows.iter().map(|row| number(row.pods)));
    for (panel, scope) in [0.0, 1.0].into_iter().zip(Scope::BOTH) {
        let left = MARGIN + panel * (width + MARGIN);
        svg.text(left + width / 2.0, top - 8.0, Anchor::Middle, 13, INK, scope.text());
        for (mark, share) in y.each() {
            let at = top + height * (1.0 - share);
            svg.line((left, at), (left + width, at), GRID);
            svg.text(left - 6.0, at + 4.0, Anchor::End, 11, GREY, &format!("{mark}"));
        }
        for (mark, share) in x.each() {
            svg.text(left + width * share, top + height + 18.0, Anchor::Middle, 11, GREY, &format!("{mark}"));
        }
        for layout in report.layouts() {
            let at = |row: &&Row| {
                (left + width * number(row.pods) / x.end(), top + height * (1.0 - row.rtt_us.p50 / y.end()))
            };
            let points: Vec<(f64, f64)> = report.rows(scope, layout).iter().map(at).collect();
            svg.path(&points, colour(layout));
        }
    }
    legend(&mut svg, report, top + height + 48.0);
    caption(&mut svg, report, top + height + 76.0);
    svg.finish()
}

/// TCP with the most pods: one stream and many, on a node and across two.
fn throughput(report: &Report) -> String {
    let (top, height) = (60.0, 260.0);
    let mut svg = Svg::new(WIDTH, top + height + 110.0);
    let title = format!("TCP from pod to pod in Gbit/s, with {} pods on the node", report.ratios.pods);
    svg.text(MARGIN, 28.0, Anchor::Start, 16, INK, &title);
    let (left, width) = (MARGIN, WIDTH - 2.0 * MARGIN);
    let last = |scope, layout| report.rows(scope, layout).last().copied();
    let rates = |row: &Row| [row.one_stream_gbit_s, row.many_streams_gbit_s];
    let axis = Axis::up_to(report.measured.path.iter().flat_map(rates));
    for (mark, share) in axis.each() {
        let at = top + height * (1.0 - share);
        svg.line((left, at), (left + width, at), GRID);
        svg.text(left - 6.0, at + 4.0, Anchor::End, 11, GREY, &format!("{mark}"));
    }
    let groups = Scope::BOTH.into_iter().flat_map(|scope| [(scope, 0), (scope, 1)]);
    let group_width = width / 4.0;
    for ((scope, which), start) in groups.zip([0.0, 1.0, 2.0, 3.0].map(|n| left + n * group_width)) {
        let layouts = report.layouts();
        let bar = group_width * 0.8 / number(layouts.len());
        let mut x = start + group_width * 0.1;
        for layout in layouts {
            let rate = last(scope, layout).map_or(0.0, |row| rates(row)[which]);
            let length = height * rate / axis.end();
            svg.bar(x, top + height - length, bar * 0.9, length, colour(layout));
            svg.text(x + bar * 0.45, top + height - length - 4.0, Anchor::Middle, 10, INK, &format!("{rate:.1}"));
            x += bar;
        }
        let streams = if which == 0 { "1 stream".to_owned() } else { format!("{MANY} streams") };
        let middle = start + group_width / 2.0;
        svg.text(middle, top + height + 18.0, Anchor::Middle, 12, INK, &streams);
        svg.text(middle, top + height + 34.0, Anchor::Middle, 11, GREY, scope.text());
    }
    legend(&mut svg, report, top + height + 66.0);
    caption(&mut svg, report, top + height + 94.0);
    svg.finish()
}

/// ADD and DEL as bars, each with p50 in full and p99 in pale.
fn pods(report: &Report) -> String {
    let pods = &report.measured.pods;
    let mut add = vec![("ADD alone".to_owned(), pods.add_ms), ("start and end".to_owned(), pods.start_ms)];
    if let Some(floor) = &pods.floor {
        add.push(("floor: netlink".to_owned(), floor.netlink_ms));
        add.push(("floor: gRPC".to_owned(), floor.grpc_add_ms));
    }
    let burst = format!("{} at once", pods.burst.pods);
    let at_once = vec![(format!("ADD, {burst}"), pods.burst.add_ms), (format!("DEL, {burst}"), pods.burst.del_ms)];
    // Each group has a scale of its own: an ADD takes milliseconds, a DEL tens of them, a burst hundreds.
    let groups = [add, vec![("DEL alone".to_owned(), pods.del_ms)], at_once];
    let (top, row, gap, left) = (50.0, 28.0, 30.0, 170.0);
    let height = groups.iter().map(|group| row * number(group.len()) + gap).sum::<f64>() + top + 30.0;
    let mut svg = Svg::new(WIDTH, height);
    let title = format!("{}: ADD and DEL in ms, exec to exit; p50, and p99 in pale", pods.plugin);
    svg.text(MARGIN, 28.0, Anchor::Start, 16, INK, &title);
    let mut y = top;
    for group in &groups {
        let axis = Axis::up_to(group.iter().map(|(_, times)| times.p99));
        let length = |ms: f64| (WIDTH - left - MARGIN) * ms / axis.end();
        let bottom = y + row * number(group.len());
        for (mark, _) in axis.each() {
            svg.line((left + length(mark), y), (left + length(mark), bottom), GRID);
            let label = if mark < 10.0 { format!("{mark:.1}") } else { format!("{mark:.0}") };
            svg.text(left + length(mark), bottom + 14.0, Anchor::Middle, 11, GREY, &label);
        }
        for (name, times) in group {
            svg.text(left - 8.0, y + 18.0, Anchor::End, 12, INK, name);
            svg.bar(left, y + 5.0, length(times.p99), 18.0, "#bcd4ef");
            svg.bar(left, y + 5.0, length(times.p50), 18.0, "#1b6ac9");
            y += row;
        }
        y += gap;
    }
    caption(&mut svg, report, height - 14.0);
    svg.finish()
}

fn legend(svg: &mut Svg, report: &Report, y: f64) {
    let mut x = MARGIN;
    for layout in report.layouts() {
        svg.bar(x, y - 10.0, 12.0, 12.0, colour(layout));
        svg.text(x + 18.0, y, Anchor::Start, 12, INK, layout.name());
        x += 140.0;
    }
}

/// Where the figures come from, on the picture itself.
fn caption(svg: &mut Svg, report: &Report, y: f64) {
    let machine = &report.machine;
    let text = format!(
        "one machine, network namespaces: {} × {}, Linux {}; not measured on EC2",
        machine.cores, machine.cpu, machine.kernel
    );
    svg.text(MARGIN, y, Anchor::Start, 11, GREY, &text);
}

#[cfg(test)]
mod tests {
    use super::Axis;

    #[test]
    fn an_axis_ends_on_a_round_mark_above_its_values() {
        for (most, end) in [(48.6, 50.0), (750.0, 800.0), (9.9, 10.0), (0.31, 0.35), (1000.0, 1000.0)] {
            let axis = Axis::up_to([most / 2.0, most].into_iter());
            assert!((axis.end() - end).abs() < end * 0.2 && axis.end() >= most, "{most}: {}", axis.end());
        }
    }
}
