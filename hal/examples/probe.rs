//! Prints what the probe finds on this host.

fn main() {
    let outcome = ark_hal::probe::probe();
    println!("{outcome:#?}");
    std::process::exit(i32::from(!outcome.usable));
}
