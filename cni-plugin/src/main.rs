//! The CNI plugin: asks ipamd for an address, wires one pod, exits. It knows neither EC2 nor Kubernetes.
//!
//! * `input` reads the call, `spec` are the types of CNI, `answer` is the one object the runtime gets back;
//! * one file per verb: `add`, `del`, `check`, `gc`, `status` (VERSION is a line in `spec`);
//! * `pod` knows names and the shape of a result, `wiring` the kernel, `daemon` the other processes and `connection` the
//!   way to them, `queue` the releases that have to wait, `failure` every error and its code.

mod add;
mod answer;
mod check;
mod connection;
mod daemon;
mod del;
mod failure;
mod gc;
mod input;
mod log;
mod pod;
mod queue;
mod spec;
mod status;
mod wiring;

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::failure::Failure;
use crate::input::{Call, Patient, Verb};
use crate::log::Log;

#[global_allocator]
static MEMORY: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() {
    answer::catch_panics();
    answer::give(run())
}

/// The deadline of the whole process, per verb. The steps of each verb have deadlines of their own that add up to less.
fn deadline(verb: Verb) -> Duration {
    Duration::from_secs(match verb {
        Verb::Add | Verb::Gc => 35,
        Verb::Del | Verb::Check => 15,
        Verb::Status | Verb::Version => 10,
    })
}

fn run() -> Result<Option<Value>, Failure> {
    let started = Instant::now();
    let env = |name: &str| std::env::var_os(name);
    let verb = input::verb(&env)?;
    answer::within(deadline(verb));
    let stdin = input::stdin(Patient::new(std::io::stdin().lock(), input::PATIENCE))?;
    if verb == Verb::Version {
        return spec::version_answer(&stdin).map(Some);
    }
    answer::speak(spec::version_of(&stdin));
    let call = input::call(verb, &env, &stdin)?;
    let log = Log::open(&call.conf, call.log_context());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::Bug { message: format!("no async runtime: {e}") })?;
    let outcome = runtime.block_on(perform(&call, &log));
    log.outcome(&outcome, started.elapsed());
    // The end of the process takes it apart sooner.
    std::mem::forget(runtime);
    outcome
}

async fn perform(call: &Call, log: &Log) -> Result<Option<Value>, Failure> {
    match call.verb {
        Verb::Add => add::run(call, log).await,
        Verb::Del => del::run(call, log).await,
        Verb::Check => check::run(call).await,
        Verb::Gc => gc::run(call, log).await,
        Verb::Status => status::run(call).await,
        Verb::Version => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step that runs into its deadline leaves the steps behind it their time: the process never ends half way.
    #[test]
    fn the_deadlines_of_the_steps_fit_into_that_of_the_verb() {
        use {add, check, daemon, del, gc, wiring};
        let connect = daemon::CONNECT;
        let read = input::PATIENCE;
        let add = read
            + wiring::LOOK
            + connect
            + daemon::ADD_CALL
            + add::WIRE
            + (connect + daemon::POLICY_CALL)
            + (wiring::UNDO + add::UNDO_CALL);
        assert!(daemon::ADD_PATIENCE < daemon::ADD_CALL);
        assert!(add < deadline(Verb::Add), "{add:?}");
        let del = read + connect + del::LOOK_UP + wiring::UNWIRE + daemon::DEL_CALL + del::POLICY;
        assert!(del < deadline(Verb::Del), "{del:?}");
        let check = read + check::KERNEL + connect + daemon::CHECK_CALL;
        assert!(check < deadline(Verb::Check), "{check:?}");
        let gc = read + connect + daemon::GC_CALL + gc::TAKE_DOWN;
        assert!(gc < deadline(Verb::Gc), "{gc:?}");
        assert!(read + connect + daemon::STATUS_CALL < deadline(Verb::Status));
    }
}
