//! Plots the results: requests per second and p99, over concurrency.

use plotters::backend::{DrawingBackend, SVGBackend};
use plotters::{
    chart::{ChartBuilder, SeriesLabelPosition},
    coord::Shift,
    drawing::{DrawingArea, DrawingAreaErrorKind, IntoDrawingArea},
    element::{Circle, PathElement},
    series::LineSeries,
    style::{BLACK, Color, RGBColor, ShapeStyle, WHITE},
};

use super::{Series, load::Measured};

/// In pixels.
const SIZE: (u32, u32) = (900, 800);

/// Blue and orange of Okabe and Ito's palette, which can be told apart with any colour vision.
const COLOURS: [RGBColor; 2] = [RGBColor(0, 114, 178), RGBColor(213, 94, 0)];

/// The plot as an SVG document.
///
/// # Errors
///
/// The plotting library's message.
pub(super) fn svg(all: &[Series]) -> Result<String, String> {
    let mut svg = String::new();
    draw(&SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(), all)
        .map_err(|error| error.to_string())?;
    Ok(svg)
}

type Area<B> = DrawingArea<B, Shift>;
type Failed<B> = DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>;

fn draw<B: DrawingBackend>(area: &Area<B>, all: &[Series]) -> Result<(), Failed<B>> {
    area.fill(&WHITE)?;
    let (upper, lower) = area.split_vertically(SIZE.1 / 2);
    chart(&upper, "Requests per second", all, |row| Some(row.requests_per_second()))?;
    chart(&lower, "p99 (ms)", all, |row| row.percentile(99))?;
    area.present()
}

fn chart<B: DrawingBackend>(
    area: &Area<B>,
    title: &str,
    all: &[Series],
    value: fn(&Measured) -> Option<f64>,
) -> Result<(), Failed<B>> {
    let points = |series: &Series| -> Vec<(f64, f64)> {
        let point = |row| Some((row, value(row)?));
        let points = series.rows.iter().filter_map(point);
        points.map(|(row, value)| (row.concurrency as f64, value)).collect()
    };
    let every: Vec<_> = all.iter().flat_map(points).collect();
    // Axes start at zero, so that lengths in the plot are proportional to the values.
    let right = every.iter().map(|point| point.0).fold(1.0, f64::max) * 1.05;
    let top = every.iter().map(|point| point.1).fold(f64::MIN_POSITIVE, f64::max) * 1.2;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 26))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(76)
        .build_cartesian_2d(0.0..right, 0.0..top)?;
    chart
        .configure_mesh()
        .x_desc("Concurrency")
        .y_desc(title)
        .label_style(("sans-serif", 18))
        .max_light_lines(0)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| number(*y))
        .draw()?;
    for (series, colour) in all.iter().zip(COLOURS) {
        let (points, line) = (points(series), ShapeStyle::from(colour).stroke_width(2));
        chart
            .draw_series(LineSeries::new(points.clone(), line))?
            .label(series.name.clone())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], line));
        let dots = points.into_iter().map(|point| Circle::new(point, 3, colour.filled()));
        chart.draw_series(dots)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font(("sans-serif", 18))
        .draw()
}

/// With two decimals if it needs them: `0.25`, `4500`.
fn number(value: f64) -> String {
    ((value * 100.0).round() / 100.0).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn row(concurrency: usize, latency: u32) -> Measured {
        let (elapsed, latencies) = (Duration::from_secs(1), vec![latency; 10]);
        Measured { concurrency, elapsed, latencies, ..Measured::default() }
    }

    #[test]
    fn each_contender_has_a_line_in_both_charts() {
        let series = |name: &str, latency| Series {
            name: name.to_owned(),
            rows: vec![row(1, latency), row(10, 2 * latency), row(100, 3 * latency)],
        };
        let svg = svg(&[series("http://h/?a=1&b=<2>", 700), series("baseline", 900)]).unwrap();
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["Requests per second", "p99 (ms)", "Concurrency", "baseline"] {
            assert!(svg.contains(&format!(">\n{text}\n</text>")), "{text}: {svg}");
        }
        // What a user wrote is no markup.
        assert!(svg.contains("http://h/?a=1&amp;b=&lt;2&gt;"), "{svg}");
        let dots = |colour| {
            let dot = |line: &&str| line.starts_with("<circle ") && line.contains(colour);
            svg.lines().filter(dot).count()
        };
        assert_eq!((dots("#0072B2"), dots("#D55E00")), (6, 6), "{svg}");
    }

    #[test]
    fn marks_have_no_idle_digits() {
        assert_eq!(
            [0.0, 0.25, 5.0, 4500.0, 0.1 + 0.2].map(number),
            ["0", "0.25", "5", "4500", "0.3"]
        );
    }

    #[test]
    fn a_row_without_a_complete_request_has_no_p99() {
        let rows = vec![row(1, 700), Measured { latencies: Vec::new(), ..row(5, 0) }];
        let svg = svg(&[Series { name: "one".to_owned(), rows }]).unwrap();
        assert_eq!(svg.matches("<circle ").count(), 3, "{svg}");
    }
}
