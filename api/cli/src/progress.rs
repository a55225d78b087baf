//! Spinners and bars: only on a terminal, gone when done.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::Ui;

/// Redrawing interval.
const TICK: Duration = Duration::from_millis(100);

/// Something takes a while.
pub(crate) struct Spinner(ProgressBar);

impl Spinner {
    /// Shows `message` with the seconds that pass.
    pub(crate) fn new(ui: Ui, message: &str) -> Self {
        if !ui.progress {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_message(message.to_owned());
        bar.enable_steady_tick(TICK);
        Self(bar)
    }
}

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Bytes on their way.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    /// Shows how many of `total` bytes have passed, where `total` is known.
    pub(crate) fn new(ui: Ui, name: &str, total: Option<u64>) -> Self {
        if !ui.progress {
            return Self(ProgressBar::hidden());
        }
        let (bar, template) = match total {
            Some(total) => (
                ProgressBar::new(total),
                "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            ),
            None => (ProgressBar::no_length(), "{msg} {spinner} {binary_bytes} {binary_bytes_per_sec}"),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        Self(bar)
    }

    /// Another `bytes` have passed.
    pub(crate) fn advance(&self, bytes: usize) {
        self.0.inc(u64::try_from(bytes).unwrap_or(u64::MAX));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
