//! A progress bar on stderr, where there is a terminal to draw it on.

use std::sync::Arc;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar that counts up. Nothing is drawn unless stderr is a terminal. Copies count together; the
/// last one takes the bar away.
#[derive(Debug, Clone)]
pub struct Progress {
    bar: Arc<Bar>,
}

#[derive(Debug)]
struct Bar(ProgressBar);

impl Progress {
    /// A bar for `total` steps.
    pub fn new(what: &'static str, total: u64) -> Self {
        // indicatif draws nothing on a stderr that is not a terminal.
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let template = "{msg} [{bar:30}] {human_pos}/{human_len} {per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what);
        Self {
            bar: Arc::new(Bar(bar)),
        }
    }

    /// More steps are done.
    pub fn advance(&self, steps: u64) {
        self.bar.0.inc(steps);
    }

    /// So many steps are done altogether.
    pub fn set(&self, steps: u64) {
        self.bar.0.set_position(steps);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
