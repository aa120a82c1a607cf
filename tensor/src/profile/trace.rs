//! A profile as a file for chrome://tracing and Perfetto: the Trace Event Format, "complete" events with times in microseconds.

use super::report::{Report, Timed};
use super::thread_names;
use crate::io::write_atomic;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// The processor's place among the trace's processes; a GPU's is its number after it.
const HOST: usize = 0;

impl Report {
    /// Writes what ran when and on which thread to the file at `path`, for chrome://tracing or <https://ui.perfetto.dev>. GPUs have rows of their own, with their
    /// own times.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_chrome_trace(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let document = json!({ "displayTimeUnit": "ms", "traceEvents": self.trace_events() });
        write_atomic(path, |file| {
            serde_json::to_writer(file, &document).map_err(|e| Error::io("write_chrome_trace", path.display(), e.into()))
        })
    }

    fn trace_events(&self) -> Vec<Value> {
        let threads: BTreeSet<usize> = self.events.iter().map(|t| t.event.thread).collect();
        let gpus: BTreeSet<usize> = self.events.iter().filter_map(|t| t.gpu).map(|gpu| gpu.ordinal).collect();
        let label = |kind: &str, pid: usize, tid: usize, name: &str| json!({ "ph": "M", "name": kind, "pid": pid, "tid": tid, "args": { "name": name } });
        let mut events = vec![label("process_name", HOST, 0, "cpu")];
        let names = thread_names();
        events.extend(threads.into_iter().map(|thread| label("thread_name", HOST, thread, names.get(thread).map_or("", String::as_str))));
        events.extend(gpus.into_iter().map(|gpu| label("process_name", HOST + 1 + gpu, 0, &format!("cuda:{gpu}"))));
        for Timed { event, gpu } in &self.events {
            let micros = |ns: u64| ns as f64 / 1e3;
            let inputs: Vec<String> = event.inputs.iter().map(|(shape, dtype)| format!("{shape} {dtype}")).collect();
            let args = json!({ "inputs": inputs, "flop": event.flop(), "bytes": event.bytes(), "memory": event.memory });
            let span = |pid: usize, tid: usize, start: u64, ns: u64| {
                json!({
                    "ph": "X", "name": event.title(), "cat": format!("{:?}", event.kind).to_lowercase(), "pid": pid, "tid": tid,
                    "ts": micros(start.saturating_sub(self.start)), "dur": micros(ns), "args": args,
                })
            };
            events.push(span(HOST, event.thread, event.start, event.ns()));
            events.extend(gpu.map(|gpu| span(HOST + 1 + gpu.ordinal, 0, gpu.start, gpu.ns)));
        }
        events
    }
}
