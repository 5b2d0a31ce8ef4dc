//! What the chart gives each container, read from the manifest that `make chart` renders and holds against Kubernetes' schemas.

/// A container of the rendered DaemonSet.
pub struct Container {
    pub args: Vec<String>,
    /// `NAME=VALUE`; what comes from the node and the pod is left out.
    pub env: Vec<String>,
    pub probe: Option<String>,
}

/// By the lines of the manifest.
///
/// # Panics
///
/// If the manifest has no such container.
#[must_use]
pub fn container(name: &str) -> Container {
    let manifest = include_str!("../../deploy/flatwire.yaml");
    let head = format!("\n        - name: {name}\n          image: ");
    let text = manifest.split(&head).nth(1).unwrap_or_else(|| panic!("no container {name}"));
    let text = text.split("          volumeMounts:").next().unwrap_or_default();
    let after = |line: &str, key: &str| Some(line.trim().strip_prefix(key)?.trim_matches(['"', '[', ']']).to_owned());
    let lines: Vec<&str> = text.lines().collect();
    let env = lines
        .windows(2)
        .filter_map(|pair| Some(format!("{}={}", after(pair[0], "- name: ")?, after(pair[1], "value: ")?)));
    let args = lines.iter().find_map(|line| after(line, "args: ")).unwrap_or_default();
    let args = args.split(", ").map(|arg| arg.trim_matches('"').to_owned()).collect();
    let probe = lines.iter().find_map(|line| after(line, "path: "));
    Container { args, env: env.collect(), probe }
}
