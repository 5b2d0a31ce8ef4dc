//! The data path beside kube-proxy's rules: every way a packet can take to, from and through a pod, in each mode of
//! kube-proxy, with the pod on the primary ENI and on a secondary one, over UDP and TCP. What must happen is worked out
//! from what EC2 has assigned, and what did happen is what the far side says it saw.

mod cases;
mod services;

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Instant;

use lab_ec2::View;

use self::cases::{Case, Scene, Seen};
pub use self::services::Mode;
use crate::client::Lab;
use crate::ctl::{Called, NodeSpec, PodInfo, Request, Spec};
use crate::error::{Doing, Error, Result};

/// Three ENIs of four addresses: a few pods are enough to be on two of them.
const NODE_TYPE: &str = "t3.small";
const NODES: [&str; 2] = ["node-1", "node-2"];

#[derive(Debug, Clone)]
pub struct Matrix {
    pub modes: Vec<Mode>,
    pub bin_dir: Option<PathBuf>,
    pub name: String,
    /// For every ipamd.
    pub env: BTreeMap<String, String>,
}

/// The ENI of the pod that a column is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum On {
    Primary,
    Secondary,
}

impl On {
    pub const BOTH: [Self; 2] = [Self::Primary, Self::Secondary];

    fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }
}

/// One column: what was asked, and per row over UDP and TCP what is wrong, if anything.
struct Column {
    mode: Mode,
    on: On,
    cells: BTreeMap<String, [Option<String>; 2]>,
}

/// Runs the matrix and prints its table. True if nothing is wrong; the last line printed is the summary.
pub fn run(matrix: &Matrix) -> Result<bool> {
    let start = Instant::now();
    let say = |text: String| println!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());
    let program = std::env::current_exe().doing(|| "find the lab's own program".into())?;
    let node = NodeSpec { instance_type: NODE_TYPE.to_owned(), ..NodeSpec::default() };
    let spec = Spec {
        name: matrix.name.clone(),
        nodes: vec![node; NODES.len()],
        bin_dir: matrix.bin_dir.clone(),
        env: matrix.env.clone(),
        ..Spec::default()
    };
    let mut lab = Lab::start(&program, &spec)?;
    let scene = set(&mut lab)?;
    say(format!(
        "two nodes ({NODE_TYPE}), a peered VPC, the internet; {} pods on primary and secondary ENIs, {} Services",
        scene.pods(),
        scene.services.len()
    ));

    let (mut columns, mut skipped) = (Vec::new(), Vec::new());
    for mode in &matrix.modes {
        if let Err(why) = lab.run(NODES[0], &["bash", "-c", mode.trial()]) {
            let text = format!("SKIPPED {}: {why}", mode.name());
            say(text.clone());
            skipped.push(text);
            continue;
        }
        for name in NODES {
            lab.run(name, &["bash", "-ec", &mode.install(name, &scene.services)])?;
        }
        for on in On::BOTH {
            columns.push(column(&mut lab, &scene, *mode, on)?);
        }
        for name in NODES {
            lab.run(name, &["bash", "-ec", &mode.remove()])?;
        }
        say(format!("{}: every way taken", mode.name()));
    }
    let (good, all) = print(&scene, &columns);
    for text in &skipped {
        println!("{text}");
    }
    println!("matrix: passed={good}/{all}");
    Ok(good == all && all > 0)
}

/// Pods on both kinds of ENI of both nodes, and what there is to know of them.
fn set(lab: &mut Lab) -> Result<Scene> {
    let mut pods: BTreeMap<(&str, On), Vec<PodInfo>> = BTreeMap::new();
    for name in NODES {
        // Two of each kind where calls start, so that a Service leads from one pod to another.
        for number in 0.. {
            let enough = On::BOTH.iter().all(|on| pods.get(&(name, *on)).is_some_and(|pods| pods.len() >= 2));
            if enough {
                break;
            }
            if number > 12 {
                return Err(Error::refused(format!("{name} has no two pods on a secondary ENI after {number} pods")));
            }
            let pod = lab.pod_add(name, &format!("pod-{number}"))?;
            let on = eni_of(&lab.view()?, pod.address)?;
            pods.entry((name, on)).or_default().push(pod);
        }
    }
    lab.settle()?;
    let info = lab.ask(&Request::Info)?;
    Scene::new(&info, &pods)
}

fn eni_of(view: &View, address: IpAddr) -> Result<On> {
    let eni = view.enis.iter().find(|eni| eni.holds(address));
    let attachment = eni.and_then(|eni| eni.attachment.as_ref());
    match attachment {
        Some(attachment) if attachment.device.0 == 0 => Ok(On::Primary),
        Some(_) => Ok(On::Secondary),
        None => Err(Error::refused(format!("EC2 has {address} assigned to no ENI of an instance"))),
    }
}

/// Every case of one column. Calls from one place go in one request.
fn column(lab: &mut Lab, scene: &Scene, mode: Mode, on: On) -> Result<Column> {
    let mut by_place: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    for case in scene.cases(on) {
        by_place.entry(case.from.clone()).or_default().push(case);
    }
    let mut cells = BTreeMap::new();
    for (from, cases) in by_place {
        let to = cases.iter().map(|case| case.to.into()).collect();
        let called: Vec<Called> = lab.ask(&Request::Call { from, to })?;
        for (case, called) in cases.iter().zip(called) {
            let judge = |seen| (!case.expected.allows(seen)).then(|| wrong(seen, &case.expected));
            cells.insert(case.row.clone(), [judge(called.udp), judge(called.tcp)]);
        }
    }
    Ok(Column { mode, on, cells })
}

fn wrong(seen: Option<IpAddr>, expected: &Seen) -> String {
    let seen = seen.map_or("no answer".to_owned(), |address| format!("the far side saw {address}"));
    format!("{seen}, not {expected}")
}

/// The table, then what is wrong in full. Returns how many cells are right, and how many there are.
fn print(scene: &Scene, columns: &[Column]) -> (usize, usize) {
    const PROTOCOLS: [&str; 2] = ["udp", "tcp"];
    let colour = std::io::stdout().is_terminal();
    let rows: Vec<String> = scene.cases(On::Primary).into_iter().map(|case| case.row).collect();
    let width = rows.iter().map(|row| row.chars().count()).max().unwrap_or(0);
    let (mut good, mut all, mut faults) = (0, 0, Vec::new());
    let line = |first: &str, cells: Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:^9}")).collect();
        println!("{first:<width$}  {}", cells.join(" "));
    };
    println!();
    let heads =
        |head: &dyn Fn(&Column) -> String| columns.iter().map(|column| format!("{:<19}", head(column))).collect();
    let pairs = |first: &str, cells: Vec<String>| println!("{first:<width$}  {}", cells.join(" "));
    pairs("kube-proxy in mode", heads(&|column| column.mode.name().to_owned()));
    pairs("the pod's ENI", heads(&|column| column.on.name().to_owned()));
    line("over", columns.iter().flat_map(|_| PROTOCOLS.map(str::to_owned)).collect());
    for row in &rows {
        let mut cells = Vec::new();
        for column in columns {
            let results = column.cells.get(row);
            for (position, protocol) in PROTOCOLS.iter().enumerate() {
                all += 1;
                match results.and_then(|results| results[position].as_ref()) {
                    None => {
                        good += 1;
                        cells.push("ok".to_owned());
                    }
                    Some(why) => {
                        cells.push("WRONG".to_owned());
                        faults.push(format!(
                            "{row}; {}, {} ENI, {protocol}: {why}",
                            column.mode.name(),
                            column.on.name()
                        ));
                    }
                }
            }
        }
        line(row, cells);
    }
    println!();
    for fault in &faults {
        println!("{}: {fault}", if colour { "\x1b[31mwrong\x1b[0m" } else { "wrong" });
    }
    (good, all)
}
