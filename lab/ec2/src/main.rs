//! `lab-ec2`: the lab's EC2 alone, on loopback, for trying a client against it.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, ensure};
use axum::Router;
use clap::Parser;
use flatwire_core::ids::InstanceId;
use lab_ec2::{Ec2, Options, RunInstance, Tags, drive, imds_router, router, wall_clock};
use tokio::io::AsyncReadExt;

/// Serves a simulated EC2 endpoint on loopback until standard input ends or Ctrl-C.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Every id, address pick and key follows from it.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Launches one instance of this type in a fresh VPC, and serves its metadata on a port of its own.
    #[arg(long, value_name = "TYPE")]
    node: Option<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.listen.ip().is_loopback(), "{} is not a loopback address", arguments.listen);
    let options = Options { region: arguments.region, seed: arguments.seed, ..Options::default() };
    let ec2 = Arc::new(Ec2::new(options));
    let listener = tokio::net::TcpListener::bind(arguments.listen)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.listen))?;
    let admin = ec2.admin();
    println!("endpoint http://{}", listener.local_addr()?);
    println!("AWS_ACCESS_KEY_ID={}", admin.access_key);
    println!("AWS_SECRET_ACCESS_KEY={}", admin.secret);
    println!("AWS_DEFAULT_REGION={}", ec2.region());
    let imds = match &arguments.node {
        None => None,
        Some(instance_type) => Some(launch(&ec2, instance_type)?),
    };
    let imds = serve_imds(&ec2, imds);
    let server = axum::serve(listener, router(Arc::clone(&ec2), wall_clock));
    tokio::select! {
        result = server => result.context("the server failed"),
        result = imds => result.context("the metadata server failed"),
        () = drive(Arc::clone(&ec2), wall_clock) => Ok(()),
        _ = tokio::signal::ctrl_c() => Ok(()),
        () = input_ends() => Ok(()),
    }
}

/// A VPC with one subnet and one instance, and what to call them.
fn launch(ec2: &Ec2, instance_type: &str) -> anyhow::Result<InstanceId> {
    let now = wall_clock();
    let vpc = ec2.create_vpc(now, "10.0.0.0/16".parse()?, "lab")?;
    let subnet = ec2.create_subnet(now, &vpc, "10.0.0.0/20".parse()?, None, Tags::new())?;
    ec2.create_internet_gateway(now, &vpc)?;
    let run = RunInstance { name: "lab".to_owned(), ..RunInstance::new(instance_type, subnet.clone()) };
    let instance = ec2.run_instance(now, &run)?;
    println!("vpc {vpc}\nsubnet {subnet}\ninstance {instance}");
    Ok(instance)
}

/// Serves the metadata of one instance to whoever asks; without one it waits for ever.
async fn serve_imds(ec2: &Arc<Ec2>, instance: Option<InstanceId>) -> anyhow::Result<()> {
    let Some(instance) = instance else { return std::future::pending().await };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    println!("imds http://{}", listener.local_addr()?);
    let identify = Arc::new(move |_: SocketAddr| Some(instance.clone()));
    let imds: Router = imds_router(Arc::clone(ec2), wall_clock, identify);
    axum::serve(listener, imds.into_make_service_with_connect_info::<SocketAddr>()).await?;
    Ok(())
}

async fn input_ends() {
    let mut input = tokio::io::stdin();
    let mut bytes = [0; 512];
    while matches!(input.read(&mut bytes).await, Ok(count) if count > 0) {}
}
