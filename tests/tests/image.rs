//! `deploy/image.py` makes an image whose parts are what they are said to be.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn image(programs: &Path, out: &Path) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("deploy/image.py");
    let mut command = Command::new("python3");
    command.arg(script).arg(out).args(["--name", "registry.example/flatwire:v1", "--programs"]).arg(programs);
    command.output().expect("python3 starts")
}

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn every_part_has_the_digest_it_is_named_by_and_the_programs_can_be_run() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    std::fs::create_dir(at("programs")).unwrap();
    std::fs::write(at("programs/ipamd"), "a daemon").unwrap();
    let lacking = image(&at("programs"), &at("image.tar"));
    let said = String::from_utf8_lossy(&lacking.stderr).into_owned();
    assert!(!lacking.status.success() && said.contains("programs/aws-cni") && said.contains("make build"), "{said}");
    assert!(!at("image.tar").exists());

    std::fs::write(at("programs/aws-cni"), "a plugin").unwrap();
    let made = image(&at("programs"), &at("image.tar"));
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(image(&at("programs"), &at("again.tar")).status.success());
    assert_eq!(std::fs::read(at("image.tar")).unwrap(), std::fs::read(at("again.tar")).unwrap(), "the same each time");

    std::fs::create_dir(at("image")).unwrap();
    output_of("tar", &["-xf", &text(&at("image.tar")), "-C", &text(&at("image"))]);
    let blobs = at("image/blobs/sha256");
    for blob in std::fs::read_dir(&blobs).unwrap().map(Result::unwrap) {
        let digest = output_of("sha256sum", &[&text(&blob.path())]);
        assert!(digest.starts_with(blob.file_name().to_str().unwrap()), "{digest}");
    }
    let blob = |described: &Value| {
        let path = blobs.join(described["digest"].as_str().unwrap().trim_start_matches("sha256:"));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), described["size"].as_u64().unwrap());
        path
    };
    let index = json(at("image/index.json"));
    let manifest = json(blob(&index["manifests"][0]));
    let config = json(blob(&manifest["config"]));
    assert_eq!(config["config"]["Entrypoint"][0], "/flatwire/ipamd");
    assert_eq!(index["manifests"][0]["annotations"]["io.containerd.image.name"], "registry.example/flatwire:v1");

    let layer = at("layer.tar.gz");
    std::fs::copy(blob(&manifest["layers"][0]), &layer).unwrap();
    output_of("gunzip", &[&text(&layer)]);
    let whole = output_of("sha256sum", &[&text(&at("layer.tar"))]);
    let known = config["rootfs"]["diff_ids"][0].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    assert!(whole.starts_with(&known), "{whole} is not {known}");
    let listing = output_of("tar", &["-tvf", &text(&at("layer.tar"))]);
    let programs: Vec<&str> = listing.lines().filter(|line| line.starts_with("-rwxr-xr-x 0/0")).collect();
    assert_eq!(programs.len(), 2, "{listing}");
    assert!(listing.contains("etc/ssl/certs/ca-certificates.crt"), "{listing}");
}

/// A program that needs a loader would not start in an image without one.
#[test]
fn a_program_that_is_not_static_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["ipamd", "aws-cni"] {
        std::fs::copy("/bin/ls", dir.path().join(name)).unwrap();
    }
    let refused = image(dir.path(), &dir.path().join("image.tar"));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("ipamd is linked dynamically"), "{said}");
}
