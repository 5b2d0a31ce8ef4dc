//! Compiles `cri.proto` as `proto/` does its contract. A crate that holds all of the interface would bring `protoc` and a
//! hundred crates for the nine calls that are made.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=cri.proto");
    let descriptors = protox::compile(["cri.proto"], ["."])?;
    tonic_prost_build::configure().build_server(false).compile_fds(descriptors)?;
    Ok(())
}
