//! `ipamd audit`: has the running daemon compare EC2, its ledger and the kernel anew, and prints what differs.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use flatwire_core::audit::AuditReport;
use flatwire_core::ids::Time;

use crate::ask::Daemon;
use crate::table::{progress, table};

/// The daemon answers with what it has after 20 s.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args, Debug)]
pub struct AuditArgs {
    /// The report as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Exit code 0: all three agree; 1: something differs; 2 (also by an error): it could not be done in full.
pub fn audit(args: &AuditArgs) -> anyhow::Result<ExitCode> {
    progress("asking EC2 and the kernel…");
    let body = args.daemon.get("/v1/audit", PATIENCE)?;
    let report: AuditReport =
        serde_json::from_str(&body).context("the daemon answered something else than an audit")?;
    if args.json {
        print!("{body}");
    } else {
        print!("{}", render(&report));
    }
    Ok(match (report.findings.is_empty(), report.is_clean()) {
        (false, _) => ExitCode::from(1),
        (true, true) => ExitCode::SUCCESS,
        (true, false) => ExitCode::from(2),
    })
}

fn render(report: &AuditReport) -> String {
    let by = |automatic: bool| if automatic { "ipamd" } else { "you" }.to_owned();
    let row = |f: &flatwire_core::audit::Finding| {
        vec![f.kind.as_str().to_owned(), f.object.clone(), by(f.automatic), f.text.clone(), f.repair.clone()]
    };
    let rows: Vec<Vec<String>> = report.findings.iter().map(row).collect();
    let mut out = table(&["DIFFERENCE", "OBJECT", "REPAIRED BY", "WHAT EACH SAYS", "REPAIR"], &rows);
    let unread: Vec<&str> = [("EC2", report.cloud_read_at), ("the kernel", report.kernel_read_at)]
        .into_iter()
        .filter_map(|(view, at): (&str, Option<Time>)| at.is_none().then_some(view))
        .collect();
    let compared = match unread.is_empty() {
        true => "EC2, ledger and kernel were read now".to_owned(),
        false => {
            format!("{} could not be read now (`ipamd status` shows the level and what rests)", unread.join(" and "))
        }
    };
    out += &match (rows.len(), unread.is_empty()) {
        (0, true) => format!("audit: clean; {compared}\n"),
        (0, false) => format!("audit: not done in full; {compared}, and the rest shows no difference\n"),
        (1, _) => format!("audit: 1 difference; {compared}\n"),
        (n, _) => format!("audit: {n} differences; {compared}\n"),
    };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::audit::{Finding, FindingKind};

    #[test]
    fn what_was_not_read_is_said() {
        let report = AuditReport { cloud_read_at: None, kernel_read_at: Some(Time(1)), findings: Vec::new() };
        let text = render(&report);
        assert!(text.contains("not done in full; EC2 could not be read now"), "{text}");
        let clean = AuditReport { cloud_read_at: Some(Time(1)), ..report.clone() };
        assert!(render(&clean).starts_with("audit: clean"));
        let finding = Finding {
            kind: FindingKind::SlotNotInCloud,
            object: "10.0.0.1/32".to_owned(),
            text: "the ledger has it".to_owned(),
            repair: "given up".to_owned(),
            automatic: true,
        };
        let text = render(&AuditReport { findings: vec![finding], ..clean });
        assert!(text.contains("slot_not_in_cloud  10.0.0.1/32  ipamd") && text.contains("1 difference;"), "{text}");
    }
}
