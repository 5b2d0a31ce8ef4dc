//! The one answer of this process. Whatever happens (a result, an error, a panic) the runtime gets exactly one JSON object on
//! standard output and an exit code that fits it.

use std::io::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::unistd::alarm;
use serde_json::Value;

use crate::failure::Failure;
use crate::spec::CniVersion;

static GIVEN: AtomicBool = AtomicBool::new(false);
static VERSION: OnceLock<CniVersion> = OnceLock::new();

/// Errors from here on are written in this version.
pub fn speak(version: CniVersion) {
    // A second version cannot come: one process reads one configuration.
    let _ = VERSION.set(version);
}

/// Writes the answer and ends the process: 0 for a result or for nothing to say, 1 for an error.
pub fn give(outcome: Result<Option<Value>, Failure>) -> ! {
    if GIVEN.swap(true, Ordering::SeqCst) {
        // A panic on the way out; a second answer would spoil the first.
        std::process::exit(1);
    }
    let (text, code) = match outcome {
        Ok(None) => (String::new(), 0),
        Ok(Some(result)) => (format!("{result}\n"), 0),
        Err(failure) => (error_text(&failure), 1),
    };
    let written = std::io::stdout().write_all(text.as_bytes()).and_then(|()| std::io::stdout().flush());
    // A result nobody could read is no success: the runtime must call DEL.
    std::process::exit(if written.is_ok() { code } else { 1 })
}

fn error_text(failure: &Failure) -> String {
    let object = failure.object(VERSION.get().copied().unwrap_or(CniVersion::NEWEST));
    serde_json::to_string(&object).map(|text| text + "\n").unwrap_or_default()
}

/// Makes a panic an error object: the release build aborts on panic, and the runtime would see nothing at all.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        let payload = panic.payload();
        let what = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
        give(Err(Failure::Bug { message: format!("{}{place}", what.unwrap_or("no message")) }))
    }));
}

/// The last resort behind the deadlines of single steps: at `after` the process ends, whatever it is waiting for, by SIGALRM.
///
/// Without a word, which no step of its own does. A thread that waits could still speak, and would cost a tenth of every ADD.
pub fn within(after: Duration) {
    let seconds = u32::try_from(after.as_secs()).unwrap_or(u32::MAX);
    alarm::set(seconds);
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    use nix::sys::signal::Signal;

    use super::*;

    #[test]
    #[ignore = "the body of the test below, which runs it in a process of its own"]
    fn panics_in_a_process_of_its_own() {
        speak(CniVersion::V0_4_0);
        catch_panics();
        panic!("the moon is not {}", "where it was");
    }

    #[test]
    #[ignore = "the body of the test below, which runs it in a process of its own"]
    fn hangs_in_a_process_of_its_own() {
        within(Duration::from_secs(1));
        std::thread::sleep(Duration::from_secs(60));
    }

    fn outcome_of(test: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", &format!("answer::tests::{test}")])
            .output()
            .unwrap()
    }

    #[test]
    fn a_panic_is_an_error_object() {
        let output = outcome_of("panics_in_a_process_of_its_own");
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stdout).unwrap();
        let object = text.lines().find_map(|line| line.find('{').and_then(|at| line.get(at..))).unwrap();
        let object: Value = serde_json::from_str(object).unwrap();
        assert_eq!((&object["cniVersion"], &object["code"]), (&"0.4.0".into(), &115.into()));
        assert!(object["msg"].as_str().unwrap().contains("the moon is not where it was"));
    }

    #[test]
    fn a_hang_comes_to_an_end() {
        let status = outcome_of("hangs_in_a_process_of_its_own").status;
        assert_eq!(status.signal().map(Signal::try_from), Some(Ok(Signal::SIGALRM)));
    }
}
