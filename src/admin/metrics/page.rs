//! A page of the text format, built family by family. The `prometheus` crate writes the text.

use std::time::Duration;

use prometheus::{
    TextEncoder,
    proto::{Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use crate::histogram::Durations;

/// The labels of one series, in the order in which they are written.
pub(super) type Labels = Vec<(&'static str, String)>;

/// The families added so far.
#[derive(Debug, Default)]
pub(super) struct Page(Vec<MetricFamily>);

impl Page {
    pub(super) fn counter(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let counter = |value, metric: &mut Metric| {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        };
        self.family(name, help, MetricType::COUNTER, series, counter);
    }

    pub(super) fn gauge(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        self.family(name, help, MetricType::GAUGE, series, |value, metric: &mut Metric| {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        });
    }

    /// Adds a histogram with buckets up to `longest`. Longer durations are in the last bucket,
    /// which has no bound.
    pub(super) fn histogram(
        &mut self,
        name: &str,
        help: &str,
        longest: Duration,
        series: impl IntoIterator<Item = (Labels, Durations)>,
    ) {
        let bucket = |(bound, count)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        let histogram = |durations: Durations, metric: &mut Metric| {
            let mut histogram = Histogram::default();
            histogram.set_bucket(durations.cumulative(longest).map(bucket).collect());
            histogram.set_sample_count(durations.len());
            histogram.set_sample_sum(durations.seconds());
            metric.set_histogram(histogram);
        };
        self.family(name, help, MetricType::HISTOGRAM, series, histogram);
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Fails only for a family without name or series, which there are none of here.
        if let Err(error) = TextEncoder::new().encode_utf8(&self.0, &mut text) {
            tracing::error!(%error, "the metrics are not complete");
        }
        text
    }

    /// Adds a family, unless it has no series.
    fn family<T>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        series: impl IntoIterator<Item = (Labels, T)>,
        set: impl Fn(T, &mut Metric),
    ) {
        let metric = |(labels, value): (Labels, T)| {
            let mut metric = Metric::from_label(labels.into_iter().map(label).collect());
            set(value, &mut metric);
            metric
        };
        let metrics: Vec<Metric> = series.into_iter().map(metric).collect();
        if metrics.is_empty() {
            return;
        }
        let mut family = MetricFamily::default();
        family.set_name(name.to_owned());
        family.set_help(help.to_owned());
        family.set_field_type(kind);
        family.set_metric(metrics);
        self.0.push(family);
    }
}

fn label((name, value): (&'static str, String)) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value);
    pair
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_label_holds_does_not_end_it() {
        let mut page = Page::default();
        let labels = vec![("service", "a\"b\\c\nd{e}".to_owned()), ("slot", "0".to_owned())];
        page.gauge("lbd_test", "Of a test.", [(labels, 0.5)]);
        page.gauge("lbd_nothing", "Of nobody.", []);
        assert_eq!(
            page.text(),
            "# HELP lbd_test Of a test.\n# TYPE lbd_test gauge\n\
             lbd_test{service=\"a\\\"b\\\\c\\nd{e}\",slot=\"0\"} 0.5\n"
        );
    }

    #[test]
    fn a_histogram_counts_everything_in_its_last_bucket() {
        let (mut page, mut durations) = (Page::default(), Durations::default());
        durations.count(Duration::from_micros(100));
        durations.count(Duration::from_secs(20));
        let longest = Duration::from_micros(250);
        page.histogram("lbd_test_seconds", "Of a test.", longest, [(vec![], durations)]);
        let text = page.text();
        let lines: Vec<_> = text.lines().skip(1).collect();
        assert_eq!(
            lines,
            [
                "# TYPE lbd_test_seconds histogram",
                "lbd_test_seconds_bucket{le=\"0.0001\"} 1",
                "lbd_test_seconds_bucket{le=\"0.00025\"} 1",
                "lbd_test_seconds_bucket{le=\"+Inf\"} 2",
                "lbd_test_seconds_sum 20.0001",
                "lbd_test_seconds_count 2",
            ]
        );
    }
}
