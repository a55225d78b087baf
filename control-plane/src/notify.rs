//! What systemd is told: that `arkd` is ready, reads its configuration again, ends, and is alive (sd_notify(3)).
//!
//! The protocol is a datagram with lines `NAME=value` to the socket that `NOTIFY_SOCKET` names, so no library is needed for it.
//! Without that variable nobody listens, and nothing is sent.

use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The way to the service manager.
#[derive(Debug, Default)]
pub struct Notify {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// What the variables `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` of this process say.
    #[must_use]
    pub fn from_env() -> Self {
        Self::new(|name| std::env::var_os(name), std::process::id())
    }

    fn new(variable: impl Fn(&str) -> Option<OsString>, pid: u32) -> Self {
        let Some(socket) = variable("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else {
            return Self::default();
        };
        let number = |name| variable(name).and_then(|text| text.to_str()?.parse::<u64>().ok());
        // Without a pid it is meant for whoever was started; with one, for that process alone.
        let is_ours = number("WATCHDOG_PID").is_none_or(|wanted| wanted == u64::from(pid));
        let interval = number("WATCHDOG_USEC").filter(|us| *us > 0 && is_ours);
        match connect(&socket) {
            Ok(to) => Self { to: Some(to), watchdog: interval.map(|us| Duration::from_micros(us / 2)) },
            Err(error) => {
                tracing::warn!(?socket, %error, "the service manager cannot be told anything");
                Self::default()
            }
        }
    }

    /// How often [`Self::alive`] has to be said: half of what the service manager waits for.
    #[must_use]
    pub const fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// Agents can be asked for.
    pub fn ready(&self) {
        self.send("READY=1\nSTATUS=serving\n");
    }

    /// The configuration is read again; [`Self::ready`] says that it was.
    pub fn reloading(&self) {
        // Tells this notice from an older one on its way.
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}\n", now.as_micros()));
    }

    /// Agents are being ended.
    pub fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=ending the agents\n");
    }

    /// All is well.
    pub fn alive(&self) {
        self.send("WATCHDOG=1\n");
    }

    fn send(&self, state: &str) {
        if let Some((socket, to)) = &self.to
            && let Err(error) = socket.send_to_addr(state.as_bytes(), to)
        {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

/// A path, or a name in the abstract namespace after an `@`.
fn connect(socket: &OsString) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(socket)?,
    };
    let from = UnixDatagram::unbound()?;
    // A manager that does not read must not hold arkd up.
    from.set_nonblocking(true)?;
    Ok((from, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 256];
        let count = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    }

    fn notify(socket: &str, watchdog: Option<(&str, &str)>) -> Notify {
        let variable = |name: &str| match name {
            "NOTIFY_SOCKET" => Some(OsString::from(socket)),
            "WATCHDOG_USEC" => watchdog.map(|(us, _)| us.into()),
            "WATCHDOG_PID" => watchdog.map(|(_, pid)| pid.into()).filter(|pid: &OsString| !pid.is_empty()),
            _ => None,
        };
        Notify::new(variable, 7)
    }

    #[test]
    fn a_listening_manager_is_told_line_by_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notify = notify(path.to_str().unwrap(), None);
        notify.ready();
        assert_eq!(received(&manager), "READY=1\nSTATUS=serving\n");
        notify.reloading();
        let told = received(&manager);
        let at = told.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().trim_end();
        assert!(at.parse::<u64>().unwrap() > 0, "{told}");
        notify.alive();
        assert_eq!(received(&manager), "WATCHDOG=1\n");
        notify.stopping();
        assert!(received(&manager).starts_with("STOPPING=1\n"));
        drop(manager);
        notify.alive();
    }

    #[test]
    fn abstract_sockets_are_reached_too() {
        let name = format!("ark-notify-test-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        notify(&format!("@{name}"), None).ready();
        assert!(received(&manager).starts_with("READY=1\n"));
    }

    #[test]
    fn the_watchdog_is_fed_twice_as_often_as_needed_if_it_is_meant_for_this_process() {
        let fed = |us, pid| notify("/nowhere", Some((us, pid))).watchdog();
        assert_eq!(fed("3000000", "7"), Some(Duration::from_millis(1500)));
        assert_eq!(fed("3000000", ""), Some(Duration::from_millis(1500)));
        assert_eq!(fed("3000000", "8"), None);
        assert_eq!(fed("0", "7"), None);
        assert_eq!(fed("soon", "7"), None);
        assert!(notify("", None).to.is_none(), "nobody listens");
    }
}
