//! Compiles `rpc.proto` without `protoc`: protox parses, tonic-prost-build generates.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=rpc.proto");
    let descriptors = protox::compile(["rpc.proto"], ["."])?;
    // Without transport: the plugin brings its own connection.
    tonic_prost_build::configure().build_transport(false).compile_fds(descriptors)?;
    Ok(())
}
