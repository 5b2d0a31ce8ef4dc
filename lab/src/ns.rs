//! Namespaces held by descriptor, and threads that step into them.
//!
//! A namespace lives as long as something holds it: a process inside, a mount, or a descriptor. The lab uses
//! descriptors and mounts of its own mount namespace only, so nothing of it can outlive the lab.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use flatwire_kernel::Netns;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::{Doing, Error, Result};

/// Where something runs: a network namespace and, for what runs on a node, the node's own view of the file system.
#[derive(Debug, Clone)]
pub struct Place {
    net: Arc<File>,
    mnt: Option<Arc<File>>,
}

impl Place {
    /// A new network namespace with nothing in it but a loopback link that is down.
    pub fn new() -> Result<Self> {
        let net = on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).doing(|| "create a network namespace".into())?;
            open_own("net")
        })?;
        Ok(Self { net: Arc::new(net), mnt: None })
    }

    /// What another process holds open, by its `descriptors`.
    pub fn of_process(pid: u32, net: RawFd, mnt: Option<RawFd>) -> Result<Self> {
        let open = |fd: RawFd| {
            let path = format!("/proc/{pid}/fd/{fd}");
            File::open(&path).doing(|| format!("open {path}")).map(Arc::new)
        };
        Ok(Self { net: open(net)?, mnt: mnt.map(open).transpose()? })
    }

    /// The same network namespace seen from a new mount namespace, which `arrange` furnishes. `arrange` runs inside
    /// both.
    pub fn with_mounts(&self, arrange: impl FnOnce() -> Result<()> + Send) -> Result<Self> {
        let mnt = self.run(|| {
            unshare(CloneFlags::CLONE_NEWNS).doing(|| "create a mount namespace".into())?;
            make_private()?;
            arrange()?;
            open_own("mnt")
        })??;
        Ok(Self { net: Arc::clone(&self.net), mnt: Some(Arc::new(mnt)) })
    }

    /// The same view of the file system with another network namespace: a pod as its node sees it.
    pub fn with_net_of(&self, other: &Place) -> Self {
        Self { net: Arc::clone(&other.net), mnt: self.mnt.clone() }
    }

    /// Runs `work` on a thread of its own inside this place. Child processes it starts stay here, and so do its
    /// sockets.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| {
            self.enter()?;
            Ok(work())
        })
    }

    /// As `run`, with the current runtime at hand, for sockets and children that the runtime looks after later.
    pub fn run_in_runtime<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let runtime = tokio::runtime::Handle::current();
        self.run(|| {
            let _entered = runtime.enter();
            work()
        })
    }

    /// Creates a network namespace and mounts it as `path`, as `ip netns add` and every container runtime do.
    pub fn new_at(&self, path: &Path) -> Result<Self> {
        let net = self.run(|| {
            File::create_new(path).doing(|| format!("create {}", path.display()))?;
            unshare(CloneFlags::CLONE_NEWNET).doing(|| "create a network namespace".into())?;
            bind(Path::new("/proc/thread-self/ns/net"), path)?;
            open_own("net")
        })??;
        Ok(Self { net: Arc::new(net), mnt: self.mnt.clone() })
    }

    /// Undoes `new_at`. What still holds the namespace keeps it; absent is done.
    pub fn unmount(&self, path: &Path) -> Result<()> {
        self.run(|| unmount(path))?
    }

    /// Makes the namespace known to `ip netns` under this name, within the lab.
    pub fn publish(&self, name: &str) -> Result<()> {
        let path = Path::new("/run/netns").join(name);
        File::create(&path).doing(|| format!("create {}", path.display()))?;
        bind(Path::new(&format!("/proc/self/fd/{}", self.net.as_raw_fd())), &path)
    }

    /// Undoes `publish`.
    pub fn unpublish(name: &str) -> Result<()> {
        unmount(&Path::new("/run/netns").join(name))
    }

    /// For what the kernel crate does in it.
    pub fn netns(&self) -> Result<Netns> {
        Ok(Netns::open(format!("/proc/self/fd/{}", self.net.as_raw_fd()))?)
    }

    /// Numbers under `/proc/<pid of the world>/fd` by which another process can enter: network, and mounts if there are
    /// any.
    pub fn descriptors(&self) -> (RawFd, Option<RawFd>) {
        (self.net.as_raw_fd(), self.mnt.as_ref().map(|mnt| mnt.as_raw_fd()))
    }

    fn enter(&self) -> Result<()> {
        enter(self.mnt.as_ref().map(|mnt| mnt.as_fd()), self.net.as_fd())
    }
}

/// Moves the calling thread. A thread that shares its root and working directory with others cannot change its mounts,
/// so those are unshared first.
pub fn enter(mnt: Option<BorrowedFd<'_>>, net: BorrowedFd<'_>) -> Result<()> {
    if let Some(mnt) = mnt {
        unshare(CloneFlags::CLONE_FS).doing(|| "take a root directory of its own".into())?;
        setns(mnt, CloneFlags::CLONE_NEWNS).doing(|| "enter a mount namespace".into())?;
    }
    setns(net, CloneFlags::CLONE_NEWNET).doing(|| "enter a network namespace".into())
}

/// Keeps mounts made from here on out of everybody else's sight.
pub fn make_private() -> Result<()> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .doing(|| "make mounts private".into())
}

pub fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .doing(|| format!("bind {} to {}", from.display(), to.display()))
}

fn unmount(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(errno) => return Err(errno).doing(|| format!("unmount {}", path.display())),
    }
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).doing(|| format!("remove {}", path.display())),
    }
}

/// Writes one kernel setting of the namespace the calling thread is in.
pub fn sysctl(key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys").join(key);
    fs::write(&path, value).doing(|| format!("write {value} to {}", path.display()))
}

/// True where this kernel has IPv6; it can be left out when it boots.
pub fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

fn open_own(kind: &str) -> Result<File> {
    File::open(format!("/proc/thread-self/ns/{kind}")).doing(|| format!("open the new {kind} namespace"))
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(_) => Err(Error::refused("a helper thread panicked; its message stands above")),
    })
}
