//! A tap interface of the host, which somebody made for us beforehand.
//!
//! `unsafe` here: the interface's ioctls.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::feature;

/// Where taps are opened.
const TUN: &str = "/dev/net/tun";
/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name of an interface.
    #[error("'{0}' is no interface name: 1 to 15 characters, without '/' and spaces")]
    Name(String),
    /// There is no such interface.
    #[error(
        "there is no tap interface '{0}'; make it: ip tuntap add dev {0} mode tap user $USER && ip link set {0} up"
    )]
    Missing(String),
    /// /dev/net/tun does not open.
    #[error("cannot open {TUN}: {source}; {}", tun_hint(source))]
    Device {
        /// Why.
        source: io::Error,
    },
    /// The interface is not ours to use.
    #[error("cannot use tap interface '{name}': {source}; {}", attach_hint(source))]
    Attach {
        /// The interface.
        name: String,
        /// Why.
        source: io::Error,
    },
}

fn tun_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "load the driver: modprobe tun",
        io::ErrorKind::PermissionDenied => "run as a user who may read and write it",
        _ => "does this host offer tap interfaces?",
    }
}

fn attach_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "it belongs to another user: make it with 'ip tuntap add ... user $USER'",
        Some(libc::EBUSY) => "another process uses it",
        Some(libc::EINVAL) => "it is not a plain tap interface (mode tap, without multi_queue)",
        _ => "does this host offer tap interfaces?",
    }
}

/// An open tap: reads and writes packets behind a 12-byte virtio_net_hdr, without blocking.
pub struct Tap {
    file: File,
    name: String,
    offloads: bool,
}

impl Tap {
    /// Attaches to the existing tap interface `name`.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let sound = (1..libc::IFNAMSIZ).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        let c_name = CString::new(name).ok().filter(|_| sound).ok_or_else(|| TapError::Name(name.into()))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(|source| TapError::Device { source })?;
        // Asked first, as attaching would make an interface that nobody set up.
        // SAFETY: a valid C string, which the call only reads.
        if unsafe { libc::if_nametoindex(c_name.as_ptr()) } == 0 {
            return Err(TapError::Missing(name.into()));
        }
        let tap = Self { file, name: name.into(), offloads: true };
        tap.attach(&c_name).map_err(|source| TapError::Attach { name: name.into(), source })?;
        Ok(tap)
    }

    fn attach(&self, name: &CString) -> io::Result<()> {
        let mut ifr_name = [0; libc::IFNAMSIZ];
        for (to, &from) in ifr_name.iter_mut().zip(name.as_bytes()) {
            *to = from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short };
        let request = libc::ifreq { ifr_name, ifr_ifru };
        let header_len = libc::c_int::from(super::net::HEADER as u8);
        // SAFETY: both requests read a structure of their type, alive for the call; TUNSETIFF writes the name
        // back into its own, which nobody looks at again.
        let result = unsafe {
            let attached = libc::ioctl(self.file.as_raw_fd(), libc::TUNSETIFF, &raw const request);
            if attached < 0 {
                attached
            } else {
                libc::ioctl(self.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len)
            }
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Anything that keeps packets apart can play a tap.
    #[cfg(test)]
    pub(super) fn from_socket(socket: std::os::unix::net::UnixDatagram) -> Self {
        socket.set_nonblocking(true).expect("a socket can be non-blocking");
        Self { file: std::os::fd::OwnedFd::from(socket).into(), name: "test".into(), offloads: false }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Packets go in and out here.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Lets the host hand over what a guest with these features understands: packets without checksum, and
    /// longer than a frame.
    pub(super) fn set_offloads(&self, features: u64) -> io::Result<()> {
        let mut flags: libc::c_uint = 0;
        // The host takes the others only together with checksums.
        if features & feature(VIRTIO_NET_F_GUEST_CSUM) != 0 {
            flags |= libc::TUN_F_CSUM;
            for (bit, flag) in [
                (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
                (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
            ] {
                flags |= if features & feature(bit) != 0 { flag } else { 0 };
            }
        }
        if !self.offloads {
            return Ok(());
        }
        // SAFETY: this request takes a number.
        let result =
            unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
