//! The outer process: takes a name, opens the door for people, and starts the world in namespaces of its own.
//!
//! The world is process 1 of its process namespace. Whatever ends it, the kernel ends everything inside with it, and
//! all its namespaces go; it is itself killed when the outer process dies. So a lab leaves nothing behind but the files
//! of its folder, and those are swept by the next start or by `lab clean`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{getegid, geteuid};

use crate::ctl::{Control, Request, Spec};
use crate::error::{Doing, Error, Result, chain};

/// The hidden command under which the lab starts itself as the world.
pub const WORLD_COMMAND: &str = "__world";

const LOCK: &str = "lock";

/// Where labs of this user keep their sockets.
pub fn base() -> PathBuf {
    if let Some(dir) = std::env::var_os("FLATWIRE_LAB_DIR") {
        return dir.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !geteuid().is_root() => Path::new(&dir).join("flatwire-lab"),
        _ if geteuid().is_root() => "/run/flatwire-lab".into(),
        _ => std::env::temp_dir().join(format!("flatwire-lab-{}", geteuid())),
    }
}

/// The folder of one lab.
pub fn dir_of(name: &str) -> Result<PathBuf> {
    let good = !name.is_empty() && name.len() <= 40 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if good { Ok(base().join(name)) } else { Err(Error::refused(format!("{name:?}: use letters, digits and hyphens"))) }
}

/// A world that runs, as its parent holds it. Dropping it ends the world.
pub struct Running {
    world: Child,
    dir: PathBuf,
    _hold: Control,
    _lock: File,
}

/// Starts a world. To be called before this process has any other thread: a user namespace can only be entered alone.
pub fn start(spec: &Spec, port: u16) -> Result<Running> {
    let mut spec = spec.clone();
    if let Some(keep) = &mut spec.keep {
        fs::create_dir_all(&*keep).doing(|| format!("create {}", keep.display()))?;
        *keep = keep.canonicalize().doing(|| format!("find {}", keep.display()))?;
    }
    if let Some(bin_dir) = &mut spec.bin_dir {
        *bin_dir = bin_dir.canonicalize().doing(|| format!("find {}", bin_dir.display()))?;
    }
    let dir = dir_of(&spec.name)?;
    let lock = claim(&dir, &spec.name)?;
    let api = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).doing(|| format!("listen on 127.0.0.1:{port}"))?;
    let control = UnixListener::bind(dir.join("control.sock")).doing(|| "open the control socket".into())?;
    let log = File::create(dir.join("world.log")).doing(|| "create the log".into())?;
    let spec_json = serde_json::to_string(&spec).doing(|| "the lab's own description".into())?;

    separate()?;
    let world = Command::new("/proc/self/exe")
        .arg0("lab")
        .arg(WORLD_COMMAND)
        .arg(spec_json)
        // The two listeners travel as standard input and output: the only descriptors a child inherits by plan.
        .stdin(Stdio::from(OwnedFd::from(api)))
        .stdout(Stdio::from(OwnedFd::from(control)))
        .stderr(Stdio::from(log))
        // Ctrl-C is for the outer process.
        .process_group(0)
        .spawn()
        .doing(|| "start the world".into())?;
    let pid = world.id();
    let mut guard = Unfinished { world: Some(world), dir: dir.clone() };
    for (file, pid) in [("world.pid", pid), ("outer.pid", std::process::id())] {
        fs::write(dir.join(file), pid.to_string()).doing(|| format!("write {file}"))?;
    }
    let mut hold = Control::connect(&dir)?;
    match hold.ask::<()>(&Request::Hold) {
        Ok(()) => {}
        Err(error) => return Err(Error::refused(explain(&dir, &error))),
    }
    let world = guard.world.take().expect("invariant: the guard holds the world until here");
    Ok(Running { world, dir, _hold: hold, _lock: lock })
}

impl Running {
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Once the world has ended of itself: whether it meant to.
    pub fn ended(&mut self) -> Option<bool> {
        self.world.try_wait().ok().flatten().map(|status| status.success())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("world.log")).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.world, &self.dir);
    }
}

/// Ends a world that did not come as far as being held.
struct Unfinished {
    world: Option<Child>,
    dir: PathBuf,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(world) = &mut self.world {
            end(world, &self.dir);
        }
    }
}

fn end(world: &mut Child, dir: &Path) {
    // Both fail only if the world is gone already, which is what is wanted. `wait` returns after the last process
    // inside has ended.
    let _ = world.kill();
    let _ = world.wait();
    let _ = remove(dir);
    // Succeeds for the last lab only.
    let _ = fs::remove_dir(base());
}

/// What the world said last tells more than that it ended.
fn explain(dir: &Path, error: &Error) -> String {
    let log = fs::read_to_string(dir.join("world.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().map(|line| line.trim_start_matches("lab: ")).collect();
    let tail = lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n");
    format!("the lab did not come up: {}", if tail.is_empty() { chain(error) } else { tail })
}

/// Takes the name: the lock is the kernel's, so it is free the moment its holder is gone, however it went.
fn claim(dir: &Path, name: &str) -> Result<File> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).doing(|| format!("create {}", dir.display()))?;
    let lock = open_lock(dir)?;
    if lock.try_lock().is_err() {
        return Err(Error::refused(format!(
            "a lab named {name} is up already; use --name, or `lab down --name {name}`"
        )));
    }
    sweep(dir)?;
    Ok(lock)
}

fn open_lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    OpenOptions::new().create(true).truncate(false).write(true).open(&path).doing(|| format!("open {}", path.display()))
}

/// Removes a lab's folder: its own files, and nothing that somebody else put there.
fn remove(dir: &Path) -> Result<()> {
    sweep(dir)?;
    fs::remove_file(dir.join(LOCK)).doing(|| format!("remove the lock in {}", dir.display()))?;
    fs::remove_dir(dir).doing(|| format!("remove {}", dir.display()))
}

fn sweep(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).doing(|| format!("read {}", dir.display()))? {
        let entry = entry.doing(|| format!("read {}", dir.display()))?;
        if entry.file_name() != LOCK {
            fs::remove_file(entry.path()).doing(|| format!("remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Removes the folders of labs that are no more. Returns their names.
pub fn clean() -> Result<Vec<String>> {
    let base = base();
    let entries = match fs::read_dir(&base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).doing(|| format!("read {}", base.display())),
    };
    let mut gone = Vec::new();
    for entry in entries {
        let dir = entry.doing(|| format!("read {}", base.display()))?.path();
        // A folder without a lock is not a lab's, and is left alone.
        let Ok(lock) = File::options().write(true).open(dir.join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            remove(&dir)?;
            gone.push(dir.file_name().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    let _ = fs::remove_dir(&base);
    Ok(gone)
}

/// Gives the next child a process namespace of its own and, without root, makes this process the root of a user
/// namespace, which is what lets the world make all the others.
fn separate() -> Result<()> {
    if geteuid().is_root() {
        return unshare(CloneFlags::CLONE_NEWPID).doing(|| {
            "create a process namespace; root in a container needs \
                                                            CAP_SYS_ADMIN for that"
                .into()
        });
    }
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID).map_err(|_| {
        Error::refused(
            "the lab needs root, or a kernel that lets users make user namespaces \
             (user.max_user_namespaces above 0, kernel.unprivileged_userns_clone=1, \
             kernel.apparmor_restrict_unprivileged_userns=0, as far as they exist)",
        )
    })?;
    for (file, text) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("0 {uid} 1")), ("gid_map", format!("0 {gid} 1"))]
    {
        let path = format!("/proc/self/{file}");
        OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .doing(|| format!("write {path}"))?;
    }
    Ok(())
}
