use std::sync::Mutex;

use super::*;
use crate::bus::{Bus, BusDevice};

fn events(
    device: impl FnOnce(PowerSink) -> Arc<dyn BusDevice>,
    accesses: &[(u64, &[u8])],
) -> Vec<PowerEvent> {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink: PowerSink = {
        let seen = seen.clone();
        Arc::new(move |event| seen.lock().unwrap().push(event))
    };
    let mut bus = Bus::new();
    bus.insert(0x600, 4, device(sink)).unwrap();
    for (offset, data) in accesses {
        bus.write(0x600 + offset, data);
    }
    let seen = seen.lock().unwrap();
    seen.clone()
}

#[test]
fn only_s5_with_sleep_enable_powers_off() {
    let acpi = |sink| -> Arc<dyn BusDevice> { Arc::new(PowerControl::new(sink)) };
    assert_eq!(events(acpi, &[(0, &[0x34])]), [PowerEvent::PowerOff]);
    let all_others: Vec<[u8; 1]> =
        (0..=255_u8).filter(|value| value & 0x3c != 0x34).map(|value| [value]).collect();
    let all_others: Vec<(u64, &[u8])> = all_others.iter().map(|value| (0, value.as_slice())).collect();
    assert_eq!(events(acpi, &all_others), []);
    assert_eq!(events(acpi, &[(0, &[0x34, 0]), (1, &[0x34]), (2, &[0x34]), (3, &[0x34])]), []);
}

#[test]
fn the_reset_register_takes_one_value() {
    let acpi = |sink| -> Arc<dyn BusDevice> { Arc::new(PowerControl::new(sink)) };
    assert_eq!(events(acpi, &[(2, &[0]), (2, &[2]), (2, &[1, 1]), (1, &[1]), (3, &[1])]), []);
    assert_eq!(events(acpi, &[(2, &[1]), (2, &[1])]), [PowerEvent::Reboot]);
}

#[test]
fn power_registers_read_as_zero() {
    let device = PowerControl::new(Arc::new(|event| panic!("{event:?}")));
    for offset in 0..4 {
        let mut byte = [0xff];
        device.read(offset, &mut byte);
        assert_eq!(byte, [0]);
    }
}

#[test]
fn a_panicking_kernel_is_heard_once() {
    let pvpanic = |sink| -> Arc<dyn BusDevice> { Arc::new(Pvpanic::new(sink)) };
    assert_eq!(
        events(pvpanic, &[(0, &[0]), (0, &[1]), (0, &[2]), (0, &[3]), (0, &[4]), (0, &[1, 0])]),
        [PowerEvent::Panicked, PowerEvent::CrashLoaded]
    );
    let mut byte = [0];
    Pvpanic::new(Arc::new(|_| ())).read(0, &mut byte);
    assert_eq!(byte, [3]);
}
