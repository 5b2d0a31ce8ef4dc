//! Network namespaces: opening them, making named ones, and doing something inside one.
//!
//! No thread that has entered a namespace is given back to anybody: what runs inside one does so on a thread of its own
//! that ends right after, and a thread that goes in to open a socket and cannot come back ends the process. Sockets opened
//! there stay in that namespace and may be used from anywhere.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use crate::error::KernelError;

/// The calling thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace held open: it lives at least as long as this value.
#[derive(Debug)]
pub struct Netns {
    file: File,
    path: PathBuf,
}

/// What tells two namespaces apart, whatever paths lead to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsId {
    pub device: u64,
    pub inode: u64,
}

impl Netns {
    /// Opens the namespace a file stands for, such as `/var/run/netns/cni-1234` or `/proc/42/ns/net`.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, KernelError> {
        let path = path.into();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) => {
                return Err(match e.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::ENOENT | Errno::ENOTDIR) => KernelError::NetnsMissing { path },
                    _ => KernelError::Netns { operation: "open", path, source: e },
                });
            }
        };
        // A leftover of a removed namespace is an ordinary empty file; entering it would only say "invalid argument".
        let kind = fstatfs(&file).map_err(|e| KernelError::Netns {
            operation: "inspect",
            path: path.clone(),
            source: e.into(),
        })?;
        if kind.filesystem_type() != NSFS_MAGIC {
            return Err(KernelError::NotANetns { path });
        }
        Ok(Self { file, path })
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, KernelError> {
        Self::open(OWN)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Identity of the namespace: device and inode.
    pub fn id(&self) -> Result<NetnsId, KernelError> {
        let meta = self.file.metadata().map_err(|source| KernelError::Netns {
            operation: "inspect",
            path: self.path.clone(),
            source,
        })?;
        Ok(NetnsId { device: meta.dev(), inode: meta.ino() })
    }

    fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.file, CloneFlags::CLONE_NEWNET)?)
    }

    /// Whether it is that of the calling thread.
    pub fn is_own(&self) -> Result<bool, KernelError> {
        let failed = |source| KernelError::Netns { operation: "inspect", path: self.path.clone(), source };
        self.is_here().map_err(failed)
    }

    /// Whether the calling thread is in it. Entering needs CAP_SYS_ADMIN even of somebody who is inside already, and the
    /// daemon, which never leaves its namespace, is to run without.
    fn is_here(&self) -> io::Result<bool> {
        let (here, this) = (fs::metadata(OWN)?, self.file.metadata()?);
        Ok((here.dev(), here.ino()) == (this.dev(), this.ino()))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Runs a closure inside a namespace, on a thread that lives for this call only, and waits for it.
pub fn in_netns<T: Send>(netns: &Netns, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    short_lived(|| {
        if !netns.is_here()? {
            netns.enter()?;
        }
        work()
    })
}

/// As `in_netns`, on the calling thread, which goes in and comes back: a thread for every socket would be a good part of what
/// wiring a pod costs. Only for work that neither waits nor starts anything.
pub(crate) fn visit<T>(netns: &Netns, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    if netns.is_here()? {
        return work();
    }
    let home = File::open(OWN)?;
    netns.enter()?;
    let _back = Back(home);
    work()
}

/// Leads home, also where the work panics.
struct Back(File);

impl Drop for Back {
    fn drop(&mut self) {
        if setns(&self.0, CloneFlags::CLONE_NEWNET).is_err() {
            // Whatever this thread did next would be done to somebody else's network.
            std::process::abort();
        }
    }
}

/// Makes a new network namespace that has no name: it is gone with this value and the sockets opened in it.
pub fn unnamed() -> Result<Netns, KernelError> {
    let path = PathBuf::from(OWN);
    let made = short_lived(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open(OWN)
    });
    match made {
        Ok(file) => Ok(Netns { file, path }),
        Err(source) => Err(KernelError::Netns { operation: "make", path, source }),
    }
}

/// Makes a new network namespace and binds it to a file, as `ip netns add` does; the file must not exist yet. With
/// `loopback_up` its `lo` is brought up.
pub async fn create_named(path: impl AsRef<Path>, loopback_up: bool) -> Result<Netns, KernelError> {
    let path = path.as_ref();
    let failed = |operation| move |source| KernelError::Netns { operation, path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed("make the folder of"))?;
    }
    OpenOptions::new().write(true).create_new(true).open(path).map_err(failed("make the file of"))?;
    let made = short_lived(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
    });
    if let Err(source) = made {
        // Nothing is mounted on it; if even this fails the first error is the one worth telling.
        let _ = fs::remove_file(path);
        return Err(failed("make")(source));
    }
    let netns = Netns::open(path)?;
    if loopback_up {
        let up = async { crate::netlink::Netlink::in_namespace(&netns)?.set_up("lo").await };
        if let Err(e) = up.await {
            let _ = remove_named(path);
            return Err(e);
        }
    }
    Ok(netns)
}

/// Removes what `create_named` made; absent means done. The namespace itself lives on while somebody uses it.
pub fn remove_named(path: impl AsRef<Path>) -> Result<(), KernelError> {
    let path = path.as_ref();
    let failed = |operation, source| KernelError::Netns { operation, path: path.to_owned(), source };
    match umount2(path, MntFlags::MNT_DETACH) {
        // Not a mount point, or not there.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(e) => return Err(failed("unmount", e.into())),
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove the file of", e)),
        _ => Ok(()),
    }
}

fn short_lived<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside the namespace panicked")))
    })
}
