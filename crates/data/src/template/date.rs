//! The date a template may ask for, and its `strftime` formatting.

use std::fmt::Write as _;

/// A moment as a calendar and a wall clock show it, for templates that print today's date.
///
/// Libraries read no clock, so the caller supplies it; the same date gives the same tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    /// The year, such as 2026.
    pub year: i32,
    /// The month, 1 to 12.
    pub month: u8,
    /// The day of the month, 1 to 31.
    pub day: u8,
    /// The hour, 0 to 23.
    pub hour: u8,
    /// The minute, 0 to 59.
    pub minute: u8,
    /// The second, 0 to 60.
    pub second: u8,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

impl Date {
    /// Makes midnight of a calendar day; `None` if there is no such day.
    ///
    /// ```
    /// # use retune_data::template::Date;
    /// assert!(Date::new(2024, 2, 29).is_some());
    /// assert!(Date::new(2023, 2, 29).is_none());
    /// ```
    pub fn new(year: i32, month: u8, day: u8) -> Option<Self> {
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let days = match month {
            2 => 28 + u8::from(leap),
            4 | 6 | 9 | 11 => 30,
            1..=12 => 31,
            _ => return None,
        };
        (1..=days).contains(&day).then_some(Self {
            year,
            month,
            day,
            hour: 0,
            minute: 0,
            second: 0,
        })
    }

    /// Converts seconds since 1970-01-01T00:00:00Z to the date in UTC.
    pub fn from_unix(seconds: i64) -> Self {
        let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Days are counted from 0000-03-01 so that the leap day ends a year (Hinnant's
        // `civil_from_days`, https://howardhinnant.github.io/date_algorithms.html).
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: (year_of_era + era * 400 + i64::from(month <= 2)) as i32,
            month: month as u8,
            day: (day_of_year - (153 * shifted_month + 2) / 5 + 1) as u8,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }

    fn day_of_year(&self) -> u16 {
        const BEFORE: [u16; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];
        let leap = (self.year % 4 == 0 && self.year % 100 != 0) || self.year % 400 == 0;
        let month = usize::from(self.month.clamp(1, 12));
        BEFORE[month - 1] + u16::from(self.day) + u16::from(leap && month > 2)
    }

    /// The day of the week, Sunday = 0 (Sakamoto's method).
    fn weekday(&self) -> usize {
        const SHIFT: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let month = usize::from(self.month.clamp(1, 12));
        let year = if month < 3 { self.year - 1 } else { self.year };
        let day = year + year.div_euclid(4) - year.div_euclid(100)
            + year.div_euclid(400)
            + SHIFT[month - 1]
            + i32::from(self.day);
        day.rem_euclid(7) as usize
    }

    /// Formats as C's `strftime` does in the English (C) locale.
    ///
    /// # Errors
    /// The conversion that is not supported, with its percent sign.
    pub fn strftime(&self, format: &str) -> Result<String, String> {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut code = chars.next();
            // `%-d`: the GNU way to leave the leading zero out.
            let bare = code == Some('-');
            if bare {
                code = chars.next();
            }
            let month = MONTHS[usize::from(self.month.clamp(1, 12)) - 1];
            let day = DAYS[self.weekday()];
            let hour12 = match self.hour % 12 {
                0 => 12,
                hour => hour,
            };
            let two = |n: u8| if bare { n.to_string() } else { format!("{n:02}") };
            let piece = match code {
                Some('Y') => self.year.to_string(),
                Some('y') => two(self.year.rem_euclid(100) as u8),
                Some('m') => two(self.month),
                Some('d') => two(self.day),
                Some('e') => format!("{:2}", self.day),
                Some('B') => month.to_owned(),
                Some('b' | 'h') => month[..3].to_owned(),
                Some('A') => day.to_owned(),
                Some('a') => day[..3].to_owned(),
                Some('w') => self.weekday().to_string(),
                Some('j') => format!("{:03}", self.day_of_year()),
                Some('H') => two(self.hour),
                Some('I') => two(hour12),
                Some('M') => two(self.minute),
                Some('S') => two(self.second),
                Some('p') => (if self.hour < 12 { "AM" } else { "PM" }).to_owned(),
                Some('F') => format!("{}-{:02}-{:02}", self.year, self.month, self.day),
                Some('T') => format!("{:02}:{:02}:{:02}", self.hour, self.minute, self.second),
                Some('%') => "%".to_owned(),
                Some(other) => return Err(format!("%{other}")),
                None => return Err("%".to_owned()),
            };
            let _ = write!(out, "{piece}");
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_what_templates_ask_for() {
        let date = Date { hour: 15, minute: 4, second: 5, ..Date::new(2024, 7, 26).unwrap() };
        assert_eq!(date.strftime("%d %b %Y").unwrap(), "26 Jul 2024");
        assert_eq!(date.strftime("%Y-%m-%d").unwrap(), "2024-07-26");
        assert_eq!(date.strftime("%A, %B %-d, %I:%M %p").unwrap(), "Friday, July 26, 03:04 PM");
        assert_eq!(date.strftime("%j %H:%M:%S 100%%").unwrap(), "208 15:04:05 100%");
        assert_eq!(date.strftime("%Q").unwrap_err(), "%Q");
        assert_eq!(date.strftime("%").unwrap_err(), "%");
    }

    #[test]
    fn weekdays_of_known_dates() {
        for (y, m, d, name) in
            [(2000, 1, 1, "Sat"), (1970, 1, 1, "Thu"), (2026, 11, 23, "Mon"), (2024, 2, 29, "Thu")]
        {
            assert_eq!(Date::new(y, m, d).unwrap().strftime("%a").unwrap(), name);
        }
    }

    #[test]
    fn unix_seconds_become_dates() {
        assert_eq!(Date::from_unix(0).strftime("%F %T").unwrap(), "1970-01-01 00:00:00");
        // 951_827_696 is 2000-02-29 12:34:56 UTC.
        assert_eq!(Date::from_unix(951_827_696).strftime("%F %T").unwrap(), "2000-02-29 12:34:56");
        assert_eq!(Date::from_unix(-1).strftime("%F %T").unwrap(), "1969-12-31 23:59:59");
    }

    #[test]
    fn impossible_days_are_refused() {
        assert!(Date::new(2023, 2, 29).is_none());
        assert!(Date::new(1900, 2, 29).is_none());
        assert!(Date::new(2023, 13, 1).is_none());
        assert!(Date::new(2023, 4, 31).is_none());
        assert!(Date::new(2023, 4, 0).is_none());
    }
}
