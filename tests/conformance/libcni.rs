//! The reference library as an outside judge: libcni runs the plugin as containerd, cri-o and podman do, through all
//! verbs and for several versions of a network configuration.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use super::driver::World;

/// Builds `conformance/libcni` with Go into cargo's temporary folder, or says why not.
fn build() -> Result<PathBuf, String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance/libcni");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("libcni-judge");
    let mut go = Command::new("go");
    go.args(["build", "-mod=readonly", "-o"]).arg(&program).arg(".").current_dir(source).env("CGO_ENABLED", "0");
    let output = go.output().map_err(|e| format!("go does not start: {e}"))?;
    if output.status.success() { Ok(program) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// ADD, CHECK, DEL, GC, STATUS and VERSION by libcni; its own decoding of our results, its cache, its errors.
#[test]
fn sec3_libcni_runs_every_verb() {
    let judge = match build() {
        Ok(judge) => judge,
        Err(why) => {
            eprintln!("SKIPPED: the reference library libcni did not judge the plugin: {why}");
            return;
        }
    };
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let world = World::new();
        let mut plugin = world.conf(version);
        plugin.as_object_mut().unwrap().retain(|key, _| key != "cniVersion" && key != "name");
        let list = json!({ "cniVersion": version, "name": "aws-cni", "plugins": [plugin] });
        let (one, two) = (world.node.pod("one"), world.node.pod("two"));
        let bin = flatwire_tests::binary("aws-cni").parent().unwrap().to_owned();
        let mut command = world.node.command(&judge);
        command.arg(&bin).arg(world.node.dir().join("cache")).arg(&one).arg(&two).arg(list.to_string());
        let output = command.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "version {version}: {said}");
        assert!(said.contains(&format!("libcni is content with {version}")), "{said}");
        assert_eq!((world.node.links().len(), world.ipamd.state().held.len()), (0, 0), "{said}");
        let asked_gc = world.ipamd.state().gcs.len();
        assert_eq!(asked_gc > 0, version == "1.1.0");
    }
}
