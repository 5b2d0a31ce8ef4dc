//! `planted`: plants classic bugs one by one in a copy of the code and shows that the simulator finds each.
//!
//! A bug is a file in `bugs/`: a title, and hunks of lines to find (` ` and `-`) and to put there (` ` and `+`). The code
//! itself knows nothing of this. A hunk that does not fit exactly one place is an error, so that the list keeps up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Parser;

/// What the simulator is built from.
const MEMBERS: &[&str] = &["ipamd/core", "ipamd/store", "lab/ec2", "lab/sim"];

/// Plants classic bugs one by one and shows that the simulator finds each.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Only bugs whose file has this in its name.
    only: Option<String>,
    /// How long the simulator may look for one bug.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How long the code must hold as it is.
    #[arg(long, default_value_t = 20)]
    holds_seconds: u64,
    /// The first seed of every run: fixed, so that what was found is found again.
    #[arg(long, default_value_t = 1)]
    from_seed: u64,
}

fn main() -> ExitCode {
    match plant_all(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("planted: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn plant_all(cli: &Cli) -> Result<bool> {
    let root = root()?;
    let bugs: Vec<Bug> = read_bugs(&root)?
        .into_iter()
        .filter(|bug| cli.only.as_ref().is_none_or(|part| bug.file.contains(part.as_str())))
        .collect();
    for bug in &bugs {
        // All of them before the first is built: a list that does not fit is known at once.
        bug.patched(&root).with_context(|| format!("{} ({})", bug.title, bug.file))?;
    }
    let copy = Copy::new(&root)?;
    println!("planted: building the simulator from a copy; the first time takes a minute or two");
    copy.write(&root, &BTreeMap::new())?;
    copy.build()?;
    match copy.simulate(cli.holds_seconds, cli.from_seed)? {
        Found { what: None, secs } => println!("  {:<66}{secs:>4} s  holds", "The code as it is"),
        Found { what: Some((seed, rule)), .. } => {
            bail!("the code as it is breaks a rule (seed {seed}: {rule}): that comes first")
        }
    }
    let (mut found, mut slowest) = (0, 0);
    for bug in &bugs {
        copy.write(&root, &bug.patched(&root)?)?;
        copy.build().with_context(|| format!("{} ({})", bug.title, bug.file))?;
        let Found { what, secs } = copy.simulate(cli.seconds, cli.from_seed)?;
        slowest = slowest.max(secs);
        match what {
            Some((seed, rule)) => {
                found += 1;
                println!("  {:<66}{secs:>4} s  seed {seed}: {rule}", bug.title);
            }
            None => println!("  {:<66}{secs:>4} s  NOT FOUND ({})", bug.title, bug.file),
        }
    }
    println!("planted: found={found}/{} slowest_secs={slowest}", bugs.len());
    Ok(found == bugs.len())
}

/// The repository, from where cargo built this.
fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).map(Path::to_owned).context("lab/sim lies two folders below the root")
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

struct Bug {
    file: String,
    title: String,
    hunks: Vec<Hunk>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Hunk {
    path: String,
    find: String,
    put: String,
}

fn read_bugs(root: &Path) -> Result<Vec<Bug>> {
    let folder = root.join("lab/sim/planted/bugs");
    let mut bugs = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file.ends_with(".bug") {
            bugs.push(Bug::parse(&file, &read(&path)?)?);
        }
    }
    bugs.sort_by(|a, b| a.file.cmp(&b.file));
    ensure!(!bugs.is_empty(), "{} holds no bugs", folder.display());
    Ok(bugs)
}

impl Bug {
    fn parse(file: &str, text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let title = lines.next().unwrap_or_default().to_owned();
        let mut hunks: Vec<Hunk> = Vec::new();
        for line in lines {
            if let Some(path) = line.strip_prefix("@ ") {
                hunks.push(Hunk { path: path.to_owned(), ..Hunk::default() });
                continue;
            }
            // What stands before the first hunk is for people.
            let Some(hunk) = hunks.last_mut() else { continue };
            let Some((mark, rest)) = line.split_at_checked(1) else { continue };
            let rest = format!("{rest}\n");
            if matches!(mark, " " | "-") {
                hunk.find.push_str(&rest);
            }
            if matches!(mark, " " | "+") {
                hunk.put.push_str(&rest);
            }
            ensure!(matches!(mark, " " | "-" | "+"), "{file}: a line of a hunk begins with ' ', '-' or '+': {line}");
        }
        ensure!(!hunks.is_empty(), "{file} changes nothing");
        Ok(Self { file: file.to_owned(), title, hunks })
    }

    /// The files it changes, changed.
    fn patched(&self, root: &Path) -> Result<BTreeMap<PathBuf, String>> {
        let mut files: BTreeMap<PathBuf, String> = BTreeMap::new();
        for hunk in &self.hunks {
            let path = PathBuf::from(&hunk.path);
            let text = match files.get(&path) {
                Some(text) => text.clone(),
                None => read(&root.join(&path))?,
            };
            let places = text.matches(hunk.find.as_str()).count();
            ensure!(places == 1, "this fits {places} places of {}, and must fit one:\n{}", hunk.path, hunk.find);
            files.insert(path, text.replacen(&hunk.find, &hunk.put, 1));
        }
        Ok(files)
    }
}

/// A workspace of its own with what the simulator needs.
struct Copy {
    folder: PathBuf,
}

struct Found {
    /// Seed and rule.
    what: Option<(String, String)>,
    secs: u64,
}

impl Copy {
    fn new(root: &Path) -> Result<Self> {
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        let folder = std::path::absolute(target)?.join("planted");
        std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { folder })
    }

    /// The code, with these files instead of its own. What has not changed is not written, so that it is not built again.
    fn write(&self, root: &Path, instead: &BTreeMap<PathBuf, String>) -> Result<()> {
        let mut files: Vec<PathBuf> = ["Cargo.lock", ".cargo/config.toml"].iter().map(PathBuf::from).collect();
        for member in MEMBERS {
            list(root, Path::new(member), &mut files)?;
        }
        for file in &files {
            match instead.get(file) {
                Some(text) => self.put(file, text.as_bytes())?,
                None => self.put(file, &std::fs::read(root.join(file)).with_context(|| file.display().to_string())?)?,
            }
        }
        self.put(Path::new("Cargo.toml"), trimmed(&read(&root.join("Cargo.toml"))?)?.as_bytes())
    }

    fn put(&self, file: &Path, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join(file);
        // Cargo trims its own copy of the lock file.
        let known = file == Path::new("Cargo.lock") && path.exists();
        if known || std::fs::read(&path).is_ok_and(|before| before == bytes) {
            return Ok(());
        }
        let parent = path.parent().context("a file is in a folder")?;
        std::fs::create_dir_all(parent)?;
        std::fs::write(&path, bytes).with_context(|| path.display().to_string())
    }

    fn cargo(&self) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.current_dir(&self.folder).env("CARGO_TARGET_DIR", self.folder.join("target")).stdin(Stdio::null());
        command
    }

    fn build(&self) -> Result<()> {
        let mut build = self.cargo();
        let output = build.args(["build", "--release", "--quiet", "-p", "lab-sim", "--bin", "sim"]).output()?;
        ensure!(output.status.success(), "does not compile:\n{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn simulate(&self, seconds: u64, from_seed: u64) -> Result<Found> {
        let started = Instant::now();
        let mut run = self.cargo();
        run.args(["run", "--release", "--quiet", "-p", "lab-sim", "--bin", "sim", "--", "run"]);
        let output = run.args(["--seconds", &seconds.to_string(), "--from-seed", &from_seed.to_string()]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let rule = text.lines().find_map(|line| line.strip_prefix("seed ")?.split_once(" broke a rule: "));
        let what = match (output.status.code(), rule) {
            (Some(0), _) => None,
            (Some(1), Some((seed, rule))) => Some((seed.to_owned(), rule.to_owned())),
            (code, _) => {
                return Err(anyhow!("sim ended with {code:?}:\n{text}{}", String::from_utf8_lossy(&output.stderr)));
            }
        };
        Ok(Found { what, secs: started.elapsed().as_secs() })
    }
}

/// Every file of a folder, by its path from the root.
fn list(root: &Path, folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(root.join(folder)).with_context(|| folder.display().to_string())? {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => list(root, &path, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// The workspace's manifest with no other members than those copied.
fn trimmed(manifest: &str) -> Result<String> {
    let (before, rest) = manifest.split_once("members = [").context("the workspace lists its members")?;
    let (_, after) = rest.split_once(']').context("the list of members ends")?;
    let members: Vec<String> = MEMBERS.iter().map(|member| format!("{member:?}")).collect();
    Ok(format!("{before}members = [{}]{after}", members.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of the code that a bug no longer fits is found here, and not only where all of them are planted.
    #[test]
    fn every_bug_fits_the_code_in_one_place() {
        let root = root().unwrap();
        let bugs = read_bugs(&root).unwrap();
        assert_eq!(bugs.len(), 10);
        for bug in bugs {
            bug.patched(&root).unwrap_or_else(|error| panic!("{}: {error:#}", bug.file));
        }
    }

    #[test]
    fn a_hunk_is_lines_to_find_and_lines_to_put_there() {
        let bug = Bug::parse("x", "A title\n\nfor people\n@ a/b.rs\n fn f() {\n-    1\n+    2\n }\n").unwrap();
        let hunk =
            Hunk { path: "a/b.rs".into(), find: "fn f() {\n    1\n}\n".into(), put: "fn f() {\n    2\n}\n".into() };
        assert_eq!((bug.title.as_str(), bug.hunks), ("A title", vec![hunk]));
        assert!(Bug::parse("x", "A title\n").is_err());
        assert!(Bug::parse("x", "A title\n@ a.rs\n*oops\n").is_err());
    }

    #[test]
    fn the_copy_has_no_other_members() {
        let text = trimmed("[workspace]\nmembers = [\n  \"a\",\n]\n[other]\n").unwrap();
        assert!(text.contains("\"lab/sim\"]\n[other]") && !text.contains("\"a\""), "{text}");
    }
}
