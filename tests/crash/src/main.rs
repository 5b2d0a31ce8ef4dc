//! ipamd, ended at a point: `FLATWIRE_CRASH_AT=after-create-eni` at its first arrival there, `after-create-eni:3` at its
//! third. Without the variable it is the daemon that is shipped.

use std::num::NonZeroU32;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use ipamd::probe::{Point, Probe};

const VARIABLE: &str = "FLATWIRE_CRASH_AT";

#[derive(Debug, Clone)]
struct CrashAt {
    point: Option<Point>,
    arrivals_left: Arc<AtomicU32>,
}

impl Probe for CrashAt {
    fn reached(&self, point: Point) {
        if self.point == Some(point) && self.arrivals_left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // As by SIGKILL: nothing is flushed, nothing unwinds, no thread goes on.
            std::process::abort();
        }
    }
}

impl CrashAt {
    fn parse(text: &str) -> anyhow::Result<Self> {
        let (point, arrival) = text.split_once(':').unwrap_or((text, "1"));
        let arrival: NonZeroU32 = arrival.parse().with_context(|| format!("{arrival:?} is no number of an arrival"))?;
        Ok(Self { point: Some(point.parse()?), arrivals_left: Arc::new(arrival.get().into()) })
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let probe = match std::env::var(VARIABLE) {
        Ok(text) => CrashAt::parse(&text).with_context(|| format!("{VARIABLE}={text:?}"))?,
        Err(_) => CrashAt { point: None, arrivals_left: Arc::default() },
    };
    Ok(ipamd::cli::main(probe))
}
