//! ipamd, ended at a point: `FLATWIRE_CRASH_AT=after-create-eni` at its first arrival there, `after-create-eni:3` at its
//! third. `FLATWIRE_HURRY=60` lets a minute pass for the pool in a second. Without either it is the daemon that is shipped.

use std::num::NonZeroU32;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context;
use ipamd::probe::{Point, Probe};

const CRASH_AT: &str = "FLATWIRE_CRASH_AT";
const HURRY: &str = "FLATWIRE_HURRY";

#[derive(Debug, Clone)]
struct CrashAt {
    point: Option<Point>,
    arrivals_left: Arc<AtomicU32>,
    hurry: u32,
}

impl Probe for CrashAt {
    fn reached(&self, point: Point) {
        if self.point == Some(point) && self.arrivals_left.fetch_sub(1, Ordering::Relaxed) == 1 {
            // As by SIGKILL: nothing is flushed, nothing unwinds, no thread goes on.
            std::process::abort();
        }
    }

    fn hurry(&self) -> u32 {
        self.hurry
    }
}

impl CrashAt {
    fn from_env() -> anyhow::Result<Self> {
        let point = match std::env::var(CRASH_AT) {
            Ok(text) => Some(parse(&text).with_context(|| format!("{CRASH_AT}={text:?}"))?),
            Err(_) => None,
        };
        let hurry = match std::env::var(HURRY) {
            Ok(text) => text.parse::<NonZeroU32>().with_context(|| format!("{HURRY}={text:?}"))?.get(),
            Err(_) => 1,
        };
        let arrivals_left = Arc::new(point.map_or(0, |(_, arrival)| arrival).into());
        Ok(Self { point: point.map(|(point, _)| point), arrivals_left, hurry })
    }
}

fn parse(text: &str) -> anyhow::Result<(Point, u32)> {
    let (point, arrival) = text.split_once(':').unwrap_or((text, "1"));
    let arrival: NonZeroU32 = arrival.parse().with_context(|| format!("{arrival:?} is no number of an arrival"))?;
    Ok((point.parse()?, arrival.get()))
}

fn main() -> anyhow::Result<ExitCode> {
    Ok(ipamd::cli::main(CrashAt::from_env()?))
}
