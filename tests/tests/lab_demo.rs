//! The demo as a test: real ipamd, real plugin, real packets, judged by what EC2 says.

use std::process::Command;

use flatwire_tests::binary;

#[test]
fn the_demo_finds_nothing_wrong_and_leaves_nothing_behind() {
    let (lab, ipamd, plugin) = (binary("lab"), binary("ipamd"), binary("aws-cni"));
    assert_eq!(ipamd.parent(), plugin.parent(), "both programs are in one folder");
    let folder = ipamd.parent().expect("a program is in a folder");
    let name = format!("demo-{}", std::process::id());
    let output = Command::new(lab)
        .args(["demo", "--pods", "20", "--name", &name, "--bin-dir"])
        .arg(folder)
        .output()
        .expect("the lab starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{complaints}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.starts_with("demo: pairs=1840/1840 nat_free=yes ec2_calls="), "{last}");
    assert!(!said.contains("wrong"), "{said}");
    let dir = lab::boot::dir_of(&name).expect("the name is a good one");
    assert!(!dir.exists());
}
