//! The data path beside kube-proxy's rules: every way a packet can take to, from and through a pod, in each mode of
//! kube-proxy, with the pod on the primary ENI and on a secondary one, over UDP and TCP, where pods have IPv4, both
//! families, or IPv6 alone. What must happen is worked out from what EC2 has assigned, and what did happen is what the far
//! side says it saw.

mod cases;
mod services;

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread::ScopedJoinHandle;
use std::time::Instant;

use clap::ValueEnum;
use lab_ec2::View;

use self::cases::{Case, Scene, Seen};
use self::services::Family;
pub use self::services::Mode;
use crate::api::element;
use crate::client::Lab;
use crate::ctl::{Called, Info, NodeSpec, PodInfo, Request, Spec};
use crate::error::{Doing, Error, Result};

/// Three ENIs of four addresses: a few pods are enough to be on two of them.
const NODE_TYPE: &str = "t3.small";
const NODES: [&str; 2] = ["node-1", "node-2"];

#[derive(Debug, Clone)]
pub struct Matrix {
    pub families: Vec<Families>,
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
    fn name(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Secondary => "secondary",
        }
    }
}

/// What addresses the pods of a lab have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// One of each family, from the same ENI.
    Dual,
    /// IPv6 alone, with the node's address for what they call over IPv4.
    V6,
}

impl Families {
    fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::Dual => "dual stack",
            Self::V6 => "IPv6 only",
        }
    }

    /// Those of Services.
    fn each(self) -> &'static [Family] {
        match self {
            Self::V4 => &[Family::V4],
            Self::Dual => &[Family::V4, Family::V6],
            Self::V6 => &[Family::V6],
        }
    }

    /// Pods of IPv6 alone need no other ENI than the primary: one prefix is enough for all.
    fn enis(self) -> &'static [On] {
        match self {
            Self::V4 | Self::Dual => &[On::Primary, On::Secondary],
            Self::V6 => &[On::Primary],
        }
    }

    fn env(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::V4 => &[],
            Self::Dual => &[("ENABLE_IPv6", "true")],
            Self::V6 => &[("ENABLE_IPv6", "true"), ("ENABLE_IPv4", "false")],
        }
    }
}

/// One column: what was asked, and per row over UDP and TCP what is wrong, if anything.
struct Column {
    mode: Mode,
    on: On,
    cells: BTreeMap<String, [Option<String>; 2]>,
}

/// The columns of one family.
struct Table {
    scene: Scene,
    columns: Vec<Column>,
}

/// Runs the matrix and prints its tables. True if nothing is wrong; the last line printed is the summary.
pub fn run(matrix: &Matrix) -> Result<bool> {
    let start = Instant::now();
    let say = |text: String| println!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());
    let (mut good, mut all, mut skipped) = (0, 0, Vec::new());
    for families in &matrix.families {
        for table in tables(matrix, *families, &say, &mut skipped)? {
            let (right, cells) = print(*families, &table);
            good += right;
            all += cells;
        }
    }
    for text in &skipped {
        println!("{text}");
    }
    println!("matrix: passed={good}/{all}");
    Ok(good == all && all > 0)
}

/// A lab whose pods have these families, with kube-proxy's rules for all of them in each mode.
fn tables(matrix: &Matrix, families: Families, say: &dyn Fn(String), skipped: &mut Vec<String>) -> Result<Vec<Table>> {
    let program = std::env::current_exe().doing(|| "find the lab's own program".into())?;
    let node = NodeSpec { instance_type: NODE_TYPE.to_owned(), ..NodeSpec::default() };
    let env = families.env().iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let spec = Spec {
        name: matrix.name.clone(),
        nodes: vec![node; NODES.len()],
        ipv6: families != Families::V4,
        bin_dir: matrix.bin_dir.clone(),
        env: env.chain(matrix.env.clone()).collect(),
        ..Spec::default()
    };
    let mut lab = Lab::start(&program, &spec)?;
    let mut tables = set(&mut lab, families)?;
    let pods = tables.first().map_or(0, |table| table.scene.pods());
    let services: usize = tables.iter().map(|table| table.scene.services.len()).sum();
    say(format!(
        "{}: two nodes ({NODE_TYPE}), a peered VPC, the internet; {pods} pods, {services} Services",
        families.name()
    ));
    for mode in &matrix.modes {
        let trials: Result<Vec<String>> =
            families.each().iter().map(|family| lab.run(NODES[0], &["bash", "-c", &mode.trial(*family)])).collect();
        if let Err(why) = trials {
            let text = format!("SKIPPED {}, {}: {why}", families.name(), mode.name());
            say(text.clone());
            skipped.push(text);
            continue;
        }
        for Table { scene, .. } in &tables {
            for name in NODES {
                lab.run(name, &["bash", "-ec", &mode.install(scene.family, name, &scene.services)])?;
            }
        }
        let columns = columns(&lab, &tables, *mode, families.enis())?;
        for (table, columns) in tables.iter_mut().zip(columns) {
            table.columns.extend(columns);
        }
        for family in families.each() {
            for name in NODES {
                lab.run(name, &["bash", "-ec", &mode.remove(*family)])?;
            }
        }
        say(format!("{}, {}: every way taken", families.name(), mode.name()));
    }
    Ok(tables)
}

/// Pods on the ENIs in question of both nodes, and what there is to know of them.
fn set(lab: &mut Lab, families: Families) -> Result<Vec<Table>> {
    let mut pods: BTreeMap<(&str, On), Vec<PodInfo>> = BTreeMap::new();
    for name in NODES {
        // Two of each kind where calls start, so that a Service leads from one pod to another.
        for number in 0.. {
            let enough = |on: &On| pods.get(&(name, *on)).is_some_and(|pods| pods.len() >= 2);
            if families.enis().iter().all(enough) {
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
    if families == Families::Dual {
        call_secondary_enis_by_ipv6(lab)?;
    }
    let info = lab.ask(&Request::Info)?;
    let table =
        |family: &Family| Ok(Table { scene: Scene::new(families, *family, &info, &pods)?, columns: Vec::new() });
    families.each().iter().map(table).collect()
}

/// Gives the nodes an IPv6 address on every secondary ENI: where there is one, NodePorts are at it.
fn call_secondary_enis_by_ipv6(lab: &mut Lab) -> Result<()> {
    let info: Info = lab.ask(&Request::Info)?;
    for node in info.nodes.iter().filter(|node| NODES.contains(&node.name.as_str())) {
        for eni in node.enis.iter().filter(|eni| eni.device > 0) {
            let parameters = [("NetworkInterfaceId", eni.id.as_str()), ("Ipv6AddressCount", "1")];
            let answer = lab.ec2().call("AssignIpv6Addresses", &parameters)?;
            let address = element(&answer, "assignedIpv6Addresses").and_then(|set| element(&set, "item"));
            let (Some(address), Some(link)) = (address, &eni.link) else {
                return Err(Error::refused(format!("{} of {} has no link, or got no address", eni.id, node.name)));
            };
            lab.run(&node.name, &["ip", "address", "add", &format!("{address}/128"), "dev", link])?;
        }
    }
    Ok(())
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

/// A mode's columns of every table, all at once: where nobody may answer, it takes its time to be sure.
fn columns(lab: &Lab, tables: &[Table], mode: Mode, enis: &[On]) -> Result<Vec<Vec<Column>>> {
    std::thread::scope(|scope| {
        let start = |scene, on| scope.spawn(move || column(lab, scene, mode, on));
        let started: Vec<Vec<_>> =
            tables.iter().map(|table| enis.iter().map(|on| start(&table.scene, *on)).collect()).collect();
        let ended = |column: ScopedJoinHandle<'_, Result<Column>>| {
            column.join().map_err(|_| Error::refused(format!("a column of {} panicked", mode.name())))?
        };
        started.into_iter().map(|columns| columns.into_iter().map(ended).collect()).collect()
    })
}

/// Every case of one column. Calls from one place go in one request.
fn column(lab: &Lab, scene: &Scene, mode: Mode, on: On) -> Result<Column> {
    let mut control = lab.connect()?;
    let mut by_place: BTreeMap<String, Vec<Case>> = BTreeMap::new();
    for case in scene.cases(on) {
        by_place.entry(case.from.clone()).or_default().push(case);
    }
    let mut cells = BTreeMap::new();
    for (from, cases) in by_place {
        let to = cases.iter().map(|case| case.to).collect();
        let called: Vec<Called> = control.ask(&Request::Call { from, to })?;
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
fn print(families: Families, Table { scene, columns }: &Table) -> (usize, usize) {
    const PROTOCOLS: [&str; 2] = ["udp", "tcp"];
    let colour = std::io::stdout().is_terminal();
    let rows: Vec<String> = scene.cases(On::Primary).into_iter().map(|case| case.row).collect();
    let width = rows.iter().map(|row| row.chars().count()).max().unwrap_or(0);
    let (mut good, mut all, mut faults) = (0, 0, Vec::new());
    let line = |first: &str, cells: Vec<String>| {
        let cells: Vec<String> = cells.iter().map(|cell| format!("{cell:^9}")).collect();
        println!("{first:<width$}  {}", cells.join(" "));
    };
    let title = format!("{}, over {}", families.name(), scene.family.name());
    println!();
    println!("{title}");
    let heads =
        |head: &dyn Fn(&Column) -> String| columns.iter().map(|column| format!("{:<19}", head(column))).collect();
    let pairs = |first: &str, cells: Vec<String>| println!("{first:<width$}  {}", cells.join(" "));
    pairs("kube-proxy in mode", heads(&|column| column.mode.name().to_owned()));
    pairs("the pod's ENI", heads(&|column| column.on.name().to_owned()));
    line("over", columns.iter().flat_map(|_| PROTOCOLS.map(str::to_owned)).collect());
    for row in &rows {
        let mut cells = Vec::new();
        for column in columns {
            let cells_of_row = column.cells.get(row).expect("invariant: every column of a table has every row");
            for (protocol, fault) in PROTOCOLS.iter().zip(cells_of_row) {
                all += 1;
                match fault {
                    None => {
                        good += 1;
                        cells.push("ok".to_owned());
                    }
                    Some(why) => {
                        cells.push("WRONG".to_owned());
                        faults.push(format!(
                            "{row}; {title}; {}, {} ENI, {protocol}: {why}",
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
