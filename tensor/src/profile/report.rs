//! What a profile recorded, added up: a row for each operation.

use super::{Event, Kind, this_thread};
use crate::{DType, Shape};
use kiln_kernels::cpu::isa::isa;
use kiln_kernels::cpu::peak::{Peaks, peaks};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// What a [`profile`](super::profile()) recorded. Its `Display` is a table of [`rows`](Report::rows), and of [`scopes`](Report::scopes) if there are any.
#[derive(Clone, Debug)]
pub struct Report {
    /// In the order in which they began on their threads; a parent stands before what runs inside of it.
    pub(super) events: Vec<Timed>,
    pub(super) start: u64,
    end: u64,
    peak_memory: usize,
}

/// An event with the GPU's time for it.
#[derive(Clone, Debug)]
pub(super) struct Timed {
    pub(super) event: Event,
    pub(super) gpu: Option<GpuTime>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct GpuTime {
    pub(super) ordinal: usize,
    /// On the host's clock, as far as the queue's first point shows it.
    pub(super) start: u64,
    pub(super) ns: u64,
}

/// What the rows of a table are told apart by, besides the operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Grouping {
    /// Shapes and dtypes of the inputs.
    pub inputs: bool,
    /// Rows for what derivative rules and the like call, as `linear backward / matmul`: otherwise it is counted with its caller.
    pub inside: bool,
}

/// One operation in a table, all its calls added up.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// The operation's name as PyTorch spells it; that of a derivative rule is `NAME backward`, of what a checkpoint computes again `NAME (recomputed)`.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Shapes and dtypes of the inputs, if the rows are grouped by them.
    pub inputs: Vec<(Shape, DType)>,
    /// How often it ran.
    pub calls: u64,
    /// From beginning to end.
    pub total: Duration,
    /// Without what has rows of its own.
    pub self_time: Duration,
    /// The GPU's time for it, without what has rows of its own, if it ran on one and the GPU keeps time. The host's times then are those of queueing the work.
    pub gpu_self_time: Option<Duration>,
    /// Floating-point operations.
    pub flop: u64,
    /// Those of [`flop`](Row::flop) that are done on f16 and bf16, and on f64.
    flop_half: u64,
    flop_double: u64,
    /// Bytes that it had to read and write.
    pub bytes: u64,
    /// Bytes that it took and kept in use, less those that it gave back; what other threads did meanwhile is in it.
    pub memory: i64,
}

impl Row {
    fn new(event: &Event) -> Self {
        Self {
            name: String::new(),
            kind: event.kind,
            inputs: Vec::new(),
            calls: 0,
            total: Duration::ZERO,
            self_time: Duration::ZERO,
            gpu_self_time: None,
            flop: 0,
            flop_half: 0,
            flop_double: 0,
            bytes: 0,
            memory: 0,
        }
    }

    /// The time that rates refer to: the GPU's if it ran on one.
    fn seconds(&self) -> f64 {
        self.gpu_self_time.unwrap_or(self.self_time).as_secs_f64()
    }

    /// 10⁹ floating-point operations a second of its own time.
    pub fn gflops(&self) -> f64 {
        self.flop as f64 / self.seconds() / 1e9
    }

    /// 10⁹ bytes a second of its own time.
    pub fn gbs(&self) -> f64 {
        self.bytes as f64 / self.seconds() / 1e9
    }

    /// The time that arithmetic and memory need at the machine's peaks, as shares of its own time. More than 1 of memory's says that data came from caches.
    fn shares_of(&self, peaks: &Peaks) -> (f64, f64) {
        let single = (self.flop - self.flop_half - self.flop_double) as f64;
        let arithmetic = (single + 2.0 * self.flop_double as f64) / peaks.f32_gflops + self.flop_half as f64 / peaks.bf16_gflops;
        (arithmetic / 1e9 / self.seconds(), self.bytes as f64 / peaks.bandwidth_gbs / 1e9 / self.seconds())
    }

    /// The larger of two shares: of the arithmetic peak that the processor was measured to have, and of its memory's bandwidth. Above 1 where data came
    /// from caches. `None` for what ran on a GPU. The first call measures the machine, which takes some tenths of a second.
    pub fn share_of_peak(&self) -> Option<f64> {
        if self.gpu_self_time.is_some() || self.seconds() == 0.0 {
            return None;
        }
        let (arithmetic, memory) = self.shares_of(&peaks());
        Some(arithmetic.max(memory))
    }
}

/// An event's part in its row.
struct Part {
    /// Whose row it is in, by index: its own, or that of the caller that it is counted with.
    home: usize,
    self_ns: i64,
    gpu_self_ns: Option<i64>,
    memory: i64,
}

impl Report {
    pub(super) fn new(mut events: Vec<Event>, start: u64, end: u64, peak_memory: usize) -> Self {
        events.sort_unstable_by_key(|event| event.id);
        // The first point of each GPU's queue, taken to be reached when the host queued it.
        let mut first: HashMap<usize, (Arc<kiln_kernels::cuda::Event>, u64)> = HashMap::new();
        let timed = |event: Event| {
            let gpu = event.gpu.as_ref().and_then(|span| {
                let (base, at) = first.entry(span.ordinal).or_insert_with(|| (span.start.clone(), event.start));
                let ns = |from: &kiln_kernels::cuda::Event, to| from.elapsed_ms(to).ok().map(|ms| (f64::from(ms) * 1e6) as u64);
                let (offset, ns) = (ns(base, &span.start)?, ns(&span.start, &span.end)?);
                Some(GpuTime { ordinal: span.ordinal, start: *at + offset, ns })
            });
            Timed { event: Event { gpu: None, ..event }, gpu }
        };
        Self { events: events.into_iter().map(timed).collect(), start, end, peak_memory }
    }

    /// Only what ran on the calling thread.
    pub fn of_this_thread(&self) -> Report {
        let thread = this_thread();
        Report { events: self.events.iter().filter(|timed| timed.event.thread == thread).cloned().collect(), ..*self }
    }

    /// How long the profile ran.
    pub fn wall(&self) -> Duration {
        Duration::from_nanos(self.end - self.start)
    }

    /// The most bytes in use on the host at one time.
    pub fn peak_memory(&self) -> usize {
        self.peak_memory
    }

    /// The operations, by name; the one that took most time first.
    pub fn rows(&self) -> Vec<Row> {
        self.rows_by(Grouping::default())
    }

    /// The operations, told apart as `grouping` says; the one that took most time first.
    pub fn rows_by(&self, grouping: Grouping) -> Vec<Row> {
        let mut rows = self.all_rows(grouping);
        rows.retain(|row| row.kind != Kind::Scope);
        rows
    }

    /// What the program named with [`profile_scope`](super::profile_scope); the one that took most time first.
    pub fn scopes(&self) -> Vec<Row> {
        let mut rows = self.all_rows(Grouping::default());
        rows.retain(|row| row.kind == Kind::Scope);
        rows.sort_by_key(|row| std::cmp::Reverse(row.total));
        rows
    }

    /// A table of [`rows_by`](Report::rows_by).
    pub fn table(&self, grouping: Grouping) -> impl fmt::Display {
        Table { report: self, grouping }
    }

    /// The names of the spans around each event, outermost first, as far as they show in its row's name.
    fn path(&self, at: usize, parents: &[Option<usize>]) -> String {
        let title = self.events[at].event.title();
        match parents[at].map(|p| (p, self.events[p].event.kind)) {
            Some((p, Kind::Backward | Kind::Composite)) => format!("{} / {title}", self.path(p, parents)),
            _ => title,
        }
    }

    /// Gives every event's time to one row each.
    fn parts(&self, parents: &[Option<usize>], inside: bool) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::with_capacity(self.events.len());
        for (i, Timed { event, gpu }) in self.events.iter().enumerate() {
            let (ns, gpu_ns) = (event.ns() as i64, gpu.map(|gpu| gpu.ns as i64));
            let mut home = i;
            if let Some(p) = parents[i] {
                let parent = &self.events[p].event;
                let belongs = !inside && event.kind == Kind::Operation && event.recomputed == parent.recomputed;
                // Who is counted with its caller hands on what it calls.
                let caller = parts[p].home;
                let folds = caller != p || matches!(parent.kind, Kind::Backward | Kind::Composite);
                if belongs && folds {
                    home = caller;
                } else {
                    let caller = &mut parts[caller];
                    caller.self_ns -= ns;
                    caller.memory -= event.memory;
                    caller.gpu_self_ns = caller.gpu_self_ns.map(|own| own - gpu_ns.unwrap_or(0));
                }
            }
            parts.push(Part { home, self_ns: ns, gpu_self_ns: gpu_ns, memory: event.memory });
        }
        parts
    }

    fn all_rows(&self, grouping: Grouping) -> Vec<Row> {
        let places: HashMap<u64, usize> = self.events.iter().enumerate().map(|(i, timed)| (timed.event.id, i)).collect();
        let parents: Vec<Option<usize>> = self.events.iter().map(|t| t.event.parent.and_then(|id| places.get(&id).copied())).collect();
        let parts = self.parts(&parents, grouping.inside);
        let mut row_of: HashMap<(Kind, String, String), usize> = HashMap::new();
        let mut rows: Vec<Row> = Vec::new();
        let mut rows_of_events: Vec<usize> = Vec::with_capacity(parts.len());
        for (i, (part, Timed { event, .. })) in parts.iter().zip(&self.events).enumerate() {
            let at = if part.home == i {
                let name = if grouping.inside { self.path(i, &parents) } else { event.title() };
                let inputs = if grouping.inputs { event.inputs.to_vec() } else { Vec::new() };
                let key = (event.kind, name.clone(), shapes(&inputs));
                let at = *row_of.entry(key).or_insert_with(|| {
                    rows.push(Row { name, inputs, ..Row::new(event) });
                    rows.len() - 1
                });
                let row = &mut rows[at];
                row.calls += 1;
                row.total += Duration::from_nanos(event.ns());
                row.self_time += Duration::from_nanos(part.self_ns.max(0) as u64);
                row.memory += part.memory;
                if let Some(ns) = part.gpu_self_ns {
                    *row.gpu_self_time.get_or_insert_default() += Duration::from_nanos(ns.max(0) as u64);
                }
                at
            } else {
                rows_of_events[part.home]
            };
            rows_of_events.push(at);
            let (row, flop) = (&mut rows[at], event.flop());
            row.flop += flop;
            row.bytes += event.bytes();
            match event.inputs.first() {
                Some((_, DType::F16 | DType::BF16)) => row.flop_half += flop,
                Some((_, DType::F64)) => row.flop_double += flop,
                _ => {}
            }
        }
        rows.sort_by_key(|row| std::cmp::Reverse(row.gpu_self_time.unwrap_or(row.self_time)));
        rows
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.table(Grouping::default()).fmt(f)
    }
}

struct Table<'a> {
    report: &'a Report,
    grouping: Grouping,
}

fn ms(time: Duration) -> String {
    format!("{:.3}", time.as_secs_f64() * 1e3)
}

/// A rate with three digits, nothing for none.
fn rate(x: f64) -> String {
    match x {
        x if !x.is_finite() || x <= 0.0 => String::new(),
        x if x < 10.0 => format!("{x:.2}"),
        x if x < 100.0 => format!("{x:.1}"),
        x => format!("{x:.0}"),
    }
}

/// Bytes in the largest unit that they fill.
fn size(bytes: i64) -> String {
    let units = [(1i64 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units.into_iter().find(|(unit, _)| bytes.abs() >= *unit) {
        Some((unit, name)) => format!("{:.1} {name}", bytes as f64 / unit as f64),
        None if bytes == 0 => String::new(),
        None => format!("{bytes} B"),
    }
}

fn shapes(inputs: &[(Shape, DType)]) -> String {
    inputs.iter().map(|(shape, dtype)| format!("{shape} {dtype}")).collect::<Vec<_>>().join(", ")
}

impl Table<'_> {
    /// The cells of a row, the name first.
    fn cells(&self, row: &Row, on_gpu: bool, peaks: &Peaks) -> Vec<String> {
        let share = |time: Duration| format!("{:.1} %", 100.0 * time.as_secs_f64() / self.report.wall().as_secs_f64().max(1e-12));
        let time = row.gpu_self_time.unwrap_or(row.self_time);
        let mut cells = vec![row.name.clone(), row.calls.to_string(), ms(row.total), ms(row.self_time)];
        if on_gpu {
            cells.push(row.gpu_self_time.map(ms).unwrap_or_default());
        }
        let of_peak = match row.shares_of(peaks) {
            _ if row.gpu_self_time.is_some() => String::new(),
            (arithmetic, memory) if !(arithmetic.max(memory) > 0.0 && arithmetic.max(memory).is_finite()) => String::new(),
            (arithmetic, memory) if arithmetic >= memory => format!("{:.0} % flop", 100.0 * arithmetic),
            (_, memory) => format!("{:.0} % mem", 100.0 * memory),
        };
        cells.extend([share(time), rate(row.gflops()), rate(row.gbs()), of_peak, size(row.memory)]);
        if self.grouping.inputs {
            cells.push(shapes(&row.inputs));
        }
        cells
    }
}

/// Columns as wide as their cells: the first to the left, as is the last if it says shapes.
fn write_columns(f: &mut fmt::Formatter<'_>, lines: &[Vec<String>], last_is_text: bool) -> fmt::Result {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in lines {
        let mut text = String::new();
        for (i, cell) in line.iter().enumerate() {
            let fill = " ".repeat(widths[i] - cell.chars().count());
            match i {
                0 => text.extend([cell, fill.as_str()]),
                _ if last_is_text && i + 1 == columns => text.extend(["  ", cell]),
                _ => text.extend(["  ", fill.as_str(), cell]),
            }
        }
        writeln!(f, "{}", text.trim_end())?;
    }
    Ok(())
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (peaks, rows, scopes) = (peaks(), self.report.rows_by(self.grouping), self.report.scopes());
        let on_gpu = rows.iter().any(|row| row.gpu_self_time.is_some());
        let mut header = vec!["operation", "calls", "total ms", "self ms"];
        header.extend(on_gpu.then_some("GPU self ms"));
        header.extend(["share", "GFLOP/s", "GB/s", "of peak", "memory"]);
        header.extend(self.grouping.inputs.then_some("inputs"));
        let mut lines = vec![header.into_iter().map(str::to_owned).collect::<Vec<_>>()];
        lines.extend(rows.iter().map(|row| self.cells(row, on_gpu, &peaks)));
        write_columns(f, &lines, self.grouping.inputs)?;
        if !scopes.is_empty() {
            let mut lines = vec![["scope", "calls", "total ms", "self ms"].map(str::to_owned).to_vec()];
            lines.extend(scopes.iter().map(|row| vec![row.name.clone(), row.calls.to_string(), ms(row.total), ms(row.self_time)]));
            writeln!(f)?;
            write_columns(f, &lines, false)?;
        }
        let inside: Duration = rows.iter().map(|row| row.self_time).sum();
        writeln!(
            f,
            "\n{} ms in all, {} ms of them in operations; at most {} in use",
            ms(self.report.wall()),
            ms(inside),
            size(self.report.peak_memory as i64)
        )?;
        let Peaks { f32_gflops, bf16_gflops, bandwidth_gbs } = peaks;
        let half = if bf16_gflops == f32_gflops { String::new() } else { format!(", bf16 {bf16_gflops:.0}") };
        write!(f, "peaks measured ({}): f32 {f32_gflops:.0}{half} GFLOP/s, memory {bandwidth_gbs:.1} GB/s", isa().name())
    }
}
