"""Saves a view of a W&B project that groups runs: one line and band for each script and environment, over environment
steps, with videos and the hyperparameters that differ below.

    pip install wandb-workspaces
    python docs/wandb_workspace.py ENTITY/PROJECT
    python docs/wandb_workspace.py ENTITY/PROJECT --group baseline my_idea
    python docs/wandb_workspace.py ENTITY/PROJECT --print       the view's definition, without a network
"""

import argparse
import sys


def workspace(entity, project, name, groups=(), by=("env_id", "script")):
    """The view: runs grouped by the arguments `by`, over environment steps."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def curve(key, title):
        return wr.LinePlot(title=title, x="global_step", y=[key], title_x="environment steps", legend_position="north")

    scores = [
        curve("charts/episodic_return", "return while training"),
        curve("eval/episodic_return", "greedy evaluation"),
        curve("charts/episodic_length", "episode length"),
        curve("charts/SPS", "environment steps a second"),
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            ws.Section("Scores", scores, is_open=True, layout_settings=ws.SectionLayoutSettings(columns=2, rows=2)),
            ws.Section("Videos", [wr.MediaBrowser(media_keys=["videos/eval"], num_columns=4)], is_open=True),
            ws.Section("Arguments", [wr.RunComparer(diff_only="split")]),
        ],
        settings=ws.WorkspaceSettings(x_axis="global_step", max_runs=100, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("group").isin(list(groups))] if groups else [],
            groupby=[ws.Config(argument) for argument in by],
        ),
        auto_generate_panels=True,  # losses/ and whatever a fork logs
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--group", nargs="+", default=[], help="only runs of these --wandb-group names")
    parser.add_argument("--by", nargs="+", default=["env_id", "script"], help="arguments to group by")
    parser.add_argument("--name", default="PlainRL", help="name of the view")
    parser.add_argument("--print", action="store_true", help="print the definition instead of saving it")
    args = parser.parse_args()
    entity, _, project = args.project.partition("/")
    if not entity or not project:
        sys.exit(f"error: ENTITY/PROJECT, not {args.project}")
    try:
        view = workspace(entity, project, args.name, args.group, args.by)
    except ImportError:
        sys.exit("error: wandb-workspaces is not installed: pip install wandb-workspaces")
    if args.print:
        print(view._to_model().model_dump_json(indent=1, by_alias=True, exclude_none=True))
        return
    try:
        print(view.save().url)
    except Exception as error:  # whatever wandb raises without a login, a network or the right to write there
        sys.exit(f"error: the view was not saved: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
