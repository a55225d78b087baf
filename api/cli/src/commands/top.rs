//! `ark top`: what agents use, live.

use std::collections::HashMap;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use ark_client::Client;
use ark_types::agent::AgentState;
use ark_types::exec::TtySize;
use ark_types::stats::{AgentStats, StatsList};
use crossterm::event::{Event, EventStream, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use crossterm::style::{Attribute, Print, SetAttribute};
use crossterm::terminal::{Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen};
use crossterm::{cursor, queue, terminal};
use futures_util::StreamExt as _;
use serde::Serialize;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::args::TopArgs;
use crate::failure::Failure;
use crate::host::Context;
use crate::output::{age, printable, size, span, table};
use crate::signals::Signals;
use crate::terminal::size as size_of_screen;

/// Time between two looks.
const REFRESH: Duration = Duration::from_secs(1);

/// What is shown at a time.
#[derive(Debug, Serialize)]
struct Shown {
    agents: Vec<Row>,
    left_out: u32,
}

/// One agent.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    stats: AgentStats,
    /// Processor time since the look before, in percent of one processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_percent: Option<f64>,
}

impl Shown {
    /// What was seen `now`, with what was used since `before`; the busiest agents first.
    fn of(before: &StatsList, now: StatsList) -> Self {
        let before: HashMap<&str, &AgentStats> = before.agents.iter().map(|a| (a.id.as_str(), a)).collect();
        let row = |stats: AgentStats| {
            let cpu_percent = before.get(stats.id.as_str()).and_then(|before| percent(before, &stats));
            Row { stats, cpu_percent }
        };
        let mut agents: Vec<Row> = now.agents.into_iter().map(row).collect();
        let busy = |row: &Row| row.cpu_percent.unwrap_or_default();
        agents.sort_by(|a, b| busy(b).total_cmp(&busy(a)).then_with(|| a.stats.name.cmp(&b.stats.name)));
        Self { agents, left_out: now.left_out }
    }

    /// Its first line.
    fn summary(&self) -> String {
        let running = self.agents.iter().filter(|row| row.stats.state == AgentState::Running).count();
        // Of nothing it is 0, not the -0 that a sum of numbers begins with.
        let cpu = self.agents.iter().filter_map(|row| row.cpu_percent).fold(0.0, |sum, cpu| sum + cpu);
        let memory: u64 = self.agents.iter().filter_map(|row| row.stats.pss_bytes).sum();
        let more =
            if self.left_out > 0 { format!(", {} more not shown", self.left_out) } else { String::new() };
        let count = self.agents.len();
        let noun = if count == 1 { "agent" } else { "agents" };
        format!("{count} {noun}, {running} running{more}; CPU {cpu:.1} %, memory {}", size(memory))
    }

    fn table(&self) -> String {
        let rows: Vec<_> = self.agents.iter().map(cells).collect();
        table(["NAME", "STATE", "IMAGE", "CPU %", "MEMORY", "OF", "AGE", "HEARTBEAT"], &rows)
    }
}

/// Processor time between two looks, in percent of one processor; none when a clock was set back or a new VMM took over.
fn percent(before: &AgentStats, now: &AgentStats) -> Option<f64> {
    let used = now.cpu_us?.checked_sub(before.cpu_us?)?;
    let passed = now.at_unix_ms.checked_sub(before.at_unix_ms).filter(|ms| *ms > 0)?;
    // Microseconds of a millisecond are tenths of a percent.
    Some(used as f64 / passed as f64 / 10.0)
}

fn cells(row: &Row) -> [String; 8] {
    let stats = &row.stats;
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        stats.name.to_string(),
        stats.state.to_string(),
        stats.image.to_string(),
        or_dash(row.cpu_percent.map(|percent| format!("{percent:.1}"))),
        or_dash(stats.pss_bytes.map(size)),
        size(stats.memory_mib << 20),
        age(stats.created_unix_ms),
        or_dash(stats.heartbeat_age_ms.map(span)),
    ]
}

/// `ark top`.
pub(crate) async fn top(context: &Context, args: &TopArgs) -> Result<(), Failure> {
    let live = !args.once && !context.ui.json;
    if live && !(io::stdout().is_terminal() && io::stdin().is_terminal()) {
        let why = "`ark top` draws on a terminal, and this is none: take --once for one look, or --json for a line each second";
        return Err(Failure::Usage(why.to_owned()));
    }
    let client = context.client().await?;
    let mut before = client.stats().await?;
    if live {
        return watch(&client, before).await;
    }
    loop {
        // What is used is what passes between two looks.
        sleep(REFRESH).await;
        let now = client.stats().await?;
        let shown = Shown::of(&before, now.clone());
        context.ui.show(&shown, |shown| format!("{}\n\n{}", shown.summary(), shown.table()))?;
        if args.once {
            return Ok(());
        }
        before = now;
    }
}

/// Draws until the user has seen enough.
async fn watch(client: &Client, mut before: StatsList) -> Result<(), Failure> {
    let mut signals = Signals::listen()?;
    let mut screen = Screen::enter().map_err(Failure::Output)?;
    let mut events = EventStream::new();
    let mut ticks = interval(REFRESH);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut shown = Shown::of(&before, before.clone());
    let mut trouble = None;
    loop {
        screen.draw(&shown, trouble.as_deref()).map_err(Failure::Output)?;
        tokio::select! {
            _ = ticks.tick() => match client.stats().await {
                Ok(now) => {
                    shown = Shown::of(&before, now.clone());
                    (before, trouble) = (now, None);
                }
                // An arkd that is started again is soon back.
                Err(error) => trouble = Some(error.to_string()),
            },
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) if is_end(key) => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Ok(()),
            },
            _ = signals.next() => return Ok(()),
        }
    }
}

/// `q`, Escape, Ctrl-C.
fn is_end(key: KeyEvent) -> bool {
    let with_control = key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind != KeyEventKind::Release
        && match key.code {
            KeyCode::Esc | KeyCode::Char('q' | 'Q') => true,
            KeyCode::Char('c') => with_control,
            _ => false,
        }
}

/// The terminal's other screen, in raw mode. Dropping it brings back what was there.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Self> {
        terminal::enable_raw_mode()?;
        // From here on the guard undoes whatever follows.
        let screen = Self;
        queue!(io::stdout(), EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }

    fn draw(&mut self, shown: &Shown, trouble: Option<&str>) -> io::Result<()> {
        let TtySize { rows, cols } = size_of_screen();
        let mut out = io::stdout().lock();
        queue!(out, cursor::MoveTo(0, 0))?;
        for (number, line) in lines(shown, trouble, cols.into(), rows.into()).iter().enumerate() {
            let heading = number == HEADING;
            if heading {
                queue!(out, SetAttribute(Attribute::Reverse))?;
            }
            queue!(out, Print(line), SetAttribute(Attribute::Reset), Clear(ClearType::UntilNewLine))?;
            queue!(out, cursor::MoveToNextLine(1))?;
        }
        queue!(out, Clear(ClearType::FromCursorDown))?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // The terminal may be gone; then there is nothing to bring back.
        let _ = queue!(io::stdout(), LeaveAlternateScreen, cursor::Show);
        let _ = io::stdout().flush();
        let _ = terminal::disable_raw_mode();
    }
}

/// Which line names the columns.
const HEADING: usize = 2;

/// What fits on a screen of that size.
fn lines(shown: &Shown, trouble: Option<&str>, columns: usize, rows: usize) -> Vec<String> {
    let second = trouble.map_or_else(|| "q: quit".to_owned(), |why| printable(&format!("no news: {why}")));
    let table = shown.table();
    let all = [shown.summary(), second].into_iter().chain(table.lines().map(str::to_owned));
    let cut = |line: String| line.lines().next().unwrap_or_default().chars().take(columns).collect();
    // The last row stays free: a line's end there would scroll.
    all.take(rows.saturating_sub(1)).map(cut).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn list(agents: &[(&str, u64, u64)]) -> StatsList {
        let agent = |(name, at, cpu): &(&str, u64, u64)| {
            let json = json!({
                "id": name, "name": name, "image": "base", "state": "running", "created_unix_ms": 0, "memory_mib": 256,
                "vcpus": 1, "at_unix_ms": at, "cpu_us": cpu, "pss_bytes": 3 << 20, "heartbeat_age_ms": 1500,
            });
            serde_json::from_value(json).unwrap()
        };
        StatsList { agents: agents.iter().map(agent).collect(), left_out: 0 }
    }

    #[test]
    fn the_busiest_come_first_and_what_is_new_has_no_share_yet() {
        let before = list(&[("a", 1000, 0), ("b", 1000, 5_000_000), ("back", 3000, 0)]);
        let now = list(&[("a", 2000, 10_000), ("b", 2000, 5_505_000), ("back", 2000, 9), ("new", 2000, 9)]);
        let shown = Shown::of(&before, now);
        let years = age(0);
        let golden = format!(
            "\
NAME  STATE    IMAGE  CPU %  MEMORY   OF       AGE{pad}  HEARTBEAT
b     running  base   50.5   3.0 MiB  256 MiB  {years}  1 s
a     running  base   1.0    3.0 MiB  256 MiB  {years}  1 s
back  running  base   -      3.0 MiB  256 MiB  {years}  1 s
new   running  base   -      3.0 MiB  256 MiB  {years}  1 s
",
            pad = " ".repeat(years.len() - 3)
        );
        assert_eq!(shown.table(), golden);
        assert_eq!(shown.summary(), "4 agents, 4 running; CPU 51.5 %, memory 12 MiB");
    }

    #[test]
    fn a_small_screen_shows_what_fits() {
        let stats = list(&[("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]);
        let shown = Shown::of(&stats, stats.clone());
        let screen = lines(&shown, Some("arkd is gone\nfor now\x1b[2J"), 16, 5);
        assert_eq!(screen, ["3 agents, 3 runn", "no news: arkd is", "NAME  STATE    I", "a     running  b"]);
        assert_eq!(lines(&shown, None, 0, 0), Vec::<String>::new());
    }
}
