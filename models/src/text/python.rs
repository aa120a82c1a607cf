//! What chat templates expect of Python: `json.dumps` and `strftime`.

use minijinja::value::Kwargs;
use minijinja::{Error, ErrorKind, Value as TemplateValue};
use serde_json::Value;
use std::fmt::Write;

/// The filter `tojson` as Hugging Face defines it: `json.dumps(x, ensure_ascii=False)`, keys in their order, nothing escaped for HTML.
pub(super) fn tojson(value: &TemplateValue, options: Kwargs) -> Result<String, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::BadSerialization, "tojson of an undefined value"));
    }
    let value = serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let indent: Option<usize> = options.get("indent")?;
    if indent.is_some_and(|indent| indent > MAX_INDENT) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: indent may be {MAX_INDENT} at most")));
    }
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two texts")),
    };
    let flag = |name: &str| options.get::<Option<bool>>(name).map(|flag| flag.unwrap_or(false));
    let mut writer = Dumps { out: String::new(), indent, item, key, ascii: flag("ensure_ascii")?, sorted: flag("sort_keys")? };
    options.assert_all_used()?;
    writer.value(&value, 0);
    Ok(writer.out)
}

/// A template decides on the width of an indentation, which is memory.
const MAX_INDENT: usize = 16;

/// `json.dumps` in progress.
struct Dumps {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sorted: bool,
}

impl Dumps {
    fn value(&mut self, value: &Value, depth: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(flag) => self.out.push_str(if *flag { "true" } else { "false" }),
            Value::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(x) => self.out.push_str(&repr(x)),
                None => self.out.push_str(&number.to_string()),
            },
            Value::String(text) => self.string(text),
            Value::Array(items) => self.list('[', ']', depth, items.iter(), |writer, item| writer.value(item, depth + 1)),
            Value::Object(object) => {
                let mut entries: Vec<_> = object.iter().collect();
                if self.sorted {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.list('{', '}', depth, entries.into_iter(), |writer, (key, value)| {
                    writer.string(key);
                    writer.out.push_str(&writer.key.clone());
                    writer.value(value, depth + 1);
                });
            }
        }
    }

    fn list<T>(&mut self, open: char, close: char, depth: usize, items: impl ExactSizeIterator<Item = T>, write: impl Fn(&mut Self, T)) {
        let empty = items.len() == 0;
        self.out.push(open);
        for (i, item) in items.enumerate() {
            if i > 0 {
                self.out.push_str(&self.item.clone());
            }
            self.new_line(depth + 1);
            write(self, item);
        }
        if !empty {
            self.new_line(depth);
        }
        self.out.push(close);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A float as Python's `repr` writes it: the shortest digits that read back as the same, with an exponent below 1e-4 and from 1e16 on.
fn repr(x: f64) -> String {
    let scientific = format!("{x:e}");
    let Some((digits, exponent)) = scientific.split_once('e') else { return scientific };
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.unsigned_abs())
        }
        _ => Some(x.to_string()).filter(|plain| plain.contains('.')).unwrap_or_else(|| format!("{x}.0")),
    }
}

const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
const MONTHS: [&str; 12] =
    ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];

/// A moment in UTC, taken apart.
struct Moment {
    year: i64,
    /// 0 to 11.
    month: usize,
    /// From 1.
    day: i64,
    /// 0 is Monday.
    weekday: usize,
    /// From 1.
    day_of_year: i64,
    second_of_day: i64,
}

impl Moment {
    /// The moment `seconds` after 1970, by counting the days of 400-year cycles that start on a 1st of March.
    fn new(seconds: i64) -> Self {
        let (days, second_of_day) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        let from_march = days + 719_468;
        let (cycle, day_of_cycle) = (from_march.div_euclid(146_097), from_march.rem_euclid(146_097));
        let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
        let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = (month_from_march + 2) % 12;
        let year = 400 * cycle + year_of_cycle + i64::from(month < 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        Self {
            year,
            month: month as usize,
            day: day_of_year - (153 * month_from_march + 2) / 5 + 1,
            weekday: (days + 3).rem_euclid(7) as usize,
            day_of_year: if month < 2 { day_of_year - 305 } else { day_of_year + 60 + i64::from(leap) },
            second_of_day,
        }
    }
}

/// The moment `seconds` after 1970, in UTC, as `format` asks: the directives `%a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F %T %%`,
/// and `%-` before one for no padding.
pub(super) fn strftime(format: &str, seconds: i64) -> Result<String, Error> {
    // Within the years that Python knows.
    let moment = Moment::new(seconds.clamp(-62_135_596_800, 253_402_300_799));
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        let padded = directive != Some('-');
        if !padded {
            directive = rest.next();
        }
        match directive.and_then(|directive| moment.directive(directive, padded)) {
            Some(text) => out.push_str(&text),
            None => {
                return Err(Error::new(ErrorKind::InvalidOperation, format!("strftime_now: %{} is not known", directive.unwrap_or(' '))));
            }
        }
    }
    Ok(out)
}

impl Moment {
    fn directive(&self, directive: char, padded: bool) -> Option<String> {
        let (hour, minute, second) = (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        let number = |value: i64, width: usize| if padded { format!("{value:0width$}") } else { value.to_string() };
        Some(match directive {
            'a' => DAYS.get(self.weekday)?.get(..3)?.to_owned(),
            'A' => (*DAYS.get(self.weekday)?).to_owned(),
            'b' => MONTHS.get(self.month)?.get(..3)?.to_owned(),
            'B' => (*MONTHS.get(self.month)?).to_owned(),
            'd' => number(self.day, 2),
            'e' => format!("{:>1$}", self.day, if padded { 2 } else { 1 }),
            'H' => number(hour, 2),
            'I' => number((hour + 11) % 12 + 1, 2),
            'j' => number(self.day_of_year, 3),
            'm' => number(self.month as i64 + 1, 2),
            'M' => number(minute, 2),
            'p' => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            'S' => number(second, 2),
            'y' => number(self.year % 100, 2),
            'Y' => self.year.to_string(),
            'F' => format!("{}-{:02}-{:02}", self.year, self.month + 1, self.day),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values from Python's `datetime.fromtimestamp(t, timezone.utc).strftime(format)`.
    #[test]
    fn dates_are_pythons() {
        let format = "%a %A %b %B %d %e %H %I %j %m %M %p %S %y %Y %F %T %% %-d %-m %-I";
        let expected = [
            (0, "Thu Thursday Jan January 01  1 00 12 001 01 00 AM 00 70 1970 1970-01-01 00:00:00 % 1 1 12"),
            (951_782_399, "Mon Monday Feb February 28 28 23 11 059 02 59 PM 59 00 2000 2000-02-28 23:59:59 % 28 2 11"),
            (951_868_800, "Wed Wednesday Mar March 01  1 00 12 061 03 00 AM 00 00 2000 2000-03-01 00:00:00 % 1 3 12"),
            (1_735_645_506, "Tue Tuesday Dec December 31 31 11 11 366 12 45 AM 06 24 2024 2024-12-31 11:45:06 % 31 12 11"),
            (-86_401, "Tue Tuesday Dec December 30 30 23 11 364 12 59 PM 59 69 1969 1969-12-30 23:59:59 % 30 12 11"),
            (4_107_542_400, "Mon Monday Mar March 01  1 00 12 060 03 00 AM 00 00 2100 2100-03-01 00:00:00 % 1 3 12"),
        ];
        for (seconds, text) in expected {
            assert_eq!(strftime(format, seconds).unwrap(), text);
        }
        assert!(strftime("%Q", 0).is_err() && strftime("%", 0).is_err() && strftime("%Y", i64::MAX).is_ok());
    }

    #[test]
    fn floats_are_pythons() {
        let expected = [(1.0, "1.0"), (0.1, "0.1"), (1e16, "1e+16"), (1e15, "1000000000000000.0"), (-2.5e-5, "-2.5e-05"), (1e-4, "0.0001")];
        for (x, text) in expected {
            assert_eq!(repr(x), text);
        }
        assert_eq!((repr(1.25e-300), repr(-0.0)), ("1.25e-300".to_owned(), "-0.0".to_owned()));
    }
}
