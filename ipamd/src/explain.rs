//! `ipamd explain`: why a pod, an address, an ENI or the target is as it is, from the reasons the running daemon recorded.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use flatwire_core::ids::EniId;
use flatwire_core::pool::Explanation;

use crate::ask::{AT_ONCE, Daemon};

#[derive(Args, Debug)]
pub struct ExplainArgs {
    #[command(subcommand)]
    about: About,
    /// The answer as JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

#[derive(Subcommand, Debug)]
enum About {
    /// What became of a pod's request.
    Pod {
        /// NAMESPACE/NAME
        #[arg(value_parser = pod)]
        pod: (String, String),
    },
    /// Who has an address, and whether it can be given.
    Address { address: IpAddr },
    /// What an ENI is there for, and where it stands.
    Eni { eni: EniId },
    /// How many addresses the pool wants, and why.
    Target,
}

fn pod(text: &str) -> Result<(String, String), String> {
    let names = text.split_once('/').filter(|(namespace, name)| is_name(namespace) && is_name(name));
    let (namespace, name) = names.ok_or("a pod is written NAMESPACE/NAME")?;
    Ok((namespace.to_owned(), name.to_owned()))
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
}

pub fn explain(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let page = match &args.about {
        About::Pod { pod: (namespace, name) } => format!("/v1/explain/pod/{namespace}/{name}"),
        About::Address { address } => format!("/v1/explain/address/{address}"),
        About::Eni { eni } => format!("/v1/explain/eni/{eni}"),
        About::Target => "/v1/explain/target".to_owned(),
    };
    let body = args.daemon.get(&page, AT_ONCE)?;
    if args.json {
        print!("{body}");
        return Ok(ExitCode::SUCCESS);
    }
    let answer: Explanation =
        serde_json::from_str(&body).context("the daemon answered something else than an explanation")?;
    print!("{}", render(&answer));
    Ok(ExitCode::SUCCESS)
}

fn render(answer: &Explanation) -> String {
    let when = |at: Option<flatwire_core::ids::Time>| at.map_or("now".to_owned(), |at| at.rfc3339());
    answer.lines.iter().map(|line| format!("{:<20}  {}\n", when(line.at), line.text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flatwire_core::ids::Time;
    use flatwire_core::pool::ExplainLine;

    #[test]
    fn what_was_and_what_is_stand_in_one_column() {
        let lines = vec![
            ExplainLine { at: Some(Time(1_709_210_096_000)), text: "asked".to_owned() },
            ExplainLine { at: None, text: "waits".to_owned() },
        ];
        assert_eq!(render(&Explanation { lines }), "2024-02-29T12:34:56Z  asked\nnow                   waits\n");
    }

    #[test]
    fn a_pod_has_two_names() {
        assert_eq!(pod("default/web-0"), Ok(("default".to_owned(), "web-0".to_owned())));
        for bad in ["web", "/web", "a/b/c", "a/b c"] {
            assert!(pod(bad).is_err(), "{bad}");
        }
    }
}
