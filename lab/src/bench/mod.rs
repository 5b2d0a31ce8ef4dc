//! bench
mod layout;
mod measure;
mod path;
mod site;

pub fn trial() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("x");
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("x");
    crate::ns::make_private().expect("x");
    nix::mount::mount(Some("tmpfs"), "/run", Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>).expect("x");
    std::fs::create_dir("/run/netns").expect("x");
    let effort = path::Effort { pods: std::env::args().skip(2).map(|a| a.parse().expect("n")).collect(), rounds: 10, trips: 500, stream_ms: 100, stream_rounds: 2 };
    let start = std::time::Instant::now();
    let rows = runtime.block_on(path::measure(&effort, &|text| eprintln!("{:.1} {text}", start.elapsed().as_secs_f64())));
    match rows {
        Ok(rows) => for r in rows { println!("{:14} {:?} {:4} p50 {:.1} p90 {:.1} p99 {:.1} few {:.1} over {:.3} {:.1} {:.1}", r.layout.name(), r.scope, r.pods, r.rtt_us.p50, r.rtt_us.p90, r.rtt_us.p99, r.few_p50_us.unwrap_or(0.0), r.over_few.unwrap_or(0.0), r.one_stream_gbit_s, r.many_streams_gbit_s); },
        Err(e) => eprintln!("{}", crate::error::chain(&e)),
    }
    eprintln!("{:.1} done", start.elapsed().as_secs_f64());
}
