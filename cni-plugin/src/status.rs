//! STATUS: could an ADD be served now? ipamd answers from memory; any reason why not is code 50.

use serde_json::Value;

use crate::daemon::Daemon;
use crate::failure::Failure;
use crate::input::Call;

pub async fn run(call: &Call) -> Result<Option<Value>, Failure> {
    match ask(call).await {
        Ok(()) => Ok(None),
        Err(failure @ Failure::Config { .. }) => Err(failure),
        Err(failure) => Err(Failure::NotReady { source: Box::new(failure) }),
    }
}

async fn ask(call: &Call) -> Result<(), Failure> {
    let mut ipamd = Daemon::connect(&call.conf.ipamd_socket()?).await?;
    match ipamd.status().await? {
        Some(status) if !status.ready => Err(Failure::from_daemon("Status", status.failure)),
        _ => Ok(()),
    }
}
